"""`--drafter` of orthrus-run, -bench and -inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drafters import drafter_file
from hybrid_dflash import dflash_file
from mtp_models import mtp_block, mtp_model, stock_model

from orthrus_gguf.cli import bench, inspect, run
from tests.tiny_model import write_drafter

DemoFile = Callable[..., Path]
RAW = ("--raw", "-p", "class Parser(", "-n", "40", "--temp", "0", "-t", "1", "--json")


@pytest.fixture
def base(demo_file: DemoFile) -> Path:
    """The demo model without heads."""
    return demo_file("f32", split=True)


def answer(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """What it prints."""
    assert run.main([*RAW, *map(str, argv)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def error(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that it ends with."""
    capsys.readouterr()
    assert run.main([*RAW, *map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "flags",
    [
        ("--strategy", "two-pass"),
        ("--draft-width", "3"),
        ("--draft-tree", "16", "--strategy", "two-pass"),
        ("--strategy", "ar", "--dflash"),
        ("--strategy", "ar", "--dflash", "--lookup", "-ctk", "q8_0", "-ctv", "q4_0"),
        ("--runtime", "reference", "--strategy", "two-pass"),
    ],
)
def test_runs_with_it(
    base: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is that of the same flags without drafts; and DFlash drafted."""
    same = [f for f in flags if f in ("-ctk", "q8_0", "-ctv", "q4_0", "--runtime", "reference")]
    plain = answer(capsys, base, "--no-heads", "--strategy", "ar", *same)
    found = answer(capsys, base, "--no-heads", "--drafter", drafter_file(), *flags)
    assert found["text"] == plain["text"]
    assert found["stats"]["sources"]["dflash"]["accepted"] >= 15


def test_llama_cpps_names(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, base, "--no-heads", "-md", drafter_file("q8_0"), "--draft-width", "7")
    assert "dflash" in str(found["stats"])


def test_beside_heads(demo_file: DemoFile, capsys: pytest.CaptureFixture[str]) -> None:
    """Two-pass drafts with the heads, unless the drafter is named."""
    for more, source in (((), "block"), (("--dflash",), "dflash")):
        flags = ("--drafter", drafter_file(), "--strategy", "two-pass", *more)
        found = answer(capsys, demo_file("f32"), *flags)
        assert [*found["stats"]["sources"]] == [source]


def test_auto(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = answer(capsys, base, "--no-heads", "--strategy", "ar")
    for flags in ((), ("--no-dflash",)):
        found = answer(capsys, base, "--no-heads", "--drafter", drafter_file(), *flags)
        assert found["text"] == plain["text"]
    assert "dflash" not in str(found["stats"])


def test_bad_input(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_drafter(tmp_path / "other.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(drafter_file().read_bytes()[:100_000])
    for path, message in (
        (other, "the model has 4096 tokens"),
        (base, "expected 'dflash', found 'qwen3'"),
        (cut, "cut.gguf"),
        (tmp_path / "none.gguf", "none.gguf: no such file"),
    ):
        assert message in error(capsys, base, "--no-heads", "--drafter", path)
    assert "--drafter" in error(capsys, drafter_file())
    for flags, message in (
        (("--strategy", "two-pass"), "or a drafter with --drafter"),
        (("--dflash",), "--dflash: needs a drafter"),
        (("--dflash", "--strategy", "ar"), "--dflash: needs a drafter"),
        (("--drafter", drafter_file(), "--draft-width", "9"), "must lie in 1..8"),
        (("--drafter", drafter_file(), "--strategy", "fused"), "no diffusion heads"),
        (
            ("--drafter", drafter_file(), "--runtime", "ggml"),
            "--runtime ggml has none; use --runtime auto",
        ),
    ):
        assert message in error(capsys, base, "--no-heads", *flags)


def test_compare(base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"code": ["def parse(", "class A:"]}))
    argv = ["compare", str(base), "--no-heads", "--drafter", str(drafter_file()), "-n", "24"]
    argv += ["--prompts", str(prompts), "-t", "1", "-o", "json"]
    assert bench.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    names = {summary["strategy"] for summary in found["summaries"]}
    assert names == {"ar", "two-pass@7", "auto"}
    assert "with drafter" in found["runtime"]


def test_record_and_simulate(
    demo_file: DemoFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a stock model, and beside heads; `auto` replays what it drafts with either."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"code": ["def parse(", "class A:"]}))
    for split, words in ((True, ()), (False, ("blocks of 4, 8, 16 rows",))):
        path = tmp_path / f"{split}.npz"
        argv = ["record", str(demo_file("f32", split=split)), *(["--no-heads"] if split else [])]
        argv += ["--drafter", str(drafter_file()), "-o", str(path), "-n", "32", "-t", "1"]
        assert bench.main([*argv, "--prompts", str(prompts)]) == 0
        err = capsys.readouterr().err
        for word in (*words, "blocks of a drafter's network, 8 rows each"):
            assert word in err
        plan = "two-pass@7+dflash"
        argv = ["simulate", str(path), "--costs", "flat,rtx-3090", "-o", "json"]
        assert bench.main([*argv, "--strategies", f"{plan},auto+no-lookup"]) == 0
        (flat, card) = json.loads(capsys.readouterr().out)["simulations"]
        assert any("0.15 of the time" in sentence for sentence in card["assumptions"])
        by = {outcome["strategy"]: outcome for outcome in flat["outcomes"]}
        assert {*by} == {"ar", plan, "auto+no-lookup", "bandit"}
        assert [*by[plan]["sources"]] == ["dflash"]
        assert by["auto+no-lookup"]["tokens_per_second"] > by["ar"]["tokens_per_second"]
    stock, new = str(demo_file("f32", split=True)), str(tmp_path / "new.npz")
    more = ["--no-heads", "--drafter", str(drafter_file()), "-o", new, "--rows", "4"]
    assert bench.main(["record", stock, *more]) == 1
    assert "--rows: of blocks of diffusion heads" in capsys.readouterr().err
    hybrid = [str(stock_model()), "--drafter", str(mtp_block()), "--runtime", "reference"]
    assert bench.main(["record", *hybrid, "-o", new]) == 1
    assert "recordings are of drafters that draft blocks" in capsys.readouterr().err
    argv = ["simulate", str(path), "--costs", "flat", "--drafter", "d.gguf"]
    assert bench.main(argv) == 1
    assert "--drafter goes with --costs FILE.gguf" in capsys.readouterr().err


def test_bench_times_its_blocks(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(base), "--no-heads", "--drafter", str(drafter_file()), "-p", "0", "-n", "0"]
    assert bench.main([*argv, "--rows", "1", "-r", "1", "-t", "1", "-d", "9", "-o", "json"]) == 0
    tests = [test["test"] for test in json.loads(capsys.readouterr().out)["tests"]]
    assert tests == ["ar 1", "drafter 8"]


def test_inspect(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(base), "--drafter", str(drafter_file("q8_0"))]
    assert inspect.main(argv) == 0
    assert "the inputs of layers 1, 3" in capsys.readouterr().out
    assert inspect.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["drafter"]
    assert (found["block_size"], found["n_layers"]) == (8, 2)
    assert found["cache_per_token"] == 2 * 2 * 128 * 2
    assert 1.3e6 < found["weights"] < 1.5e6
    assert inspect.main([str(drafter_file())]) == 0
    assert "is a drafter (dflash)" in capsys.readouterr().out
    assert inspect.main([str(base), "--drafter", str(write_drafter(tmp_path / "o.gguf"))]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_beside_a_hybrid(capsys: pytest.CaptureFixture[str]) -> None:
    """With sliding windows, in trees and with lookups; its own MTP block stays out of it."""
    few = ("-n", "12", "-c", "64")
    plain = answer(capsys, stock_model(), "--strategy", "ar", *few)
    for flags in (
        (stock_model(), "--strategy", "two-pass"),
        (stock_model(), "--strategy", "ar", "--dflash", "--lookup", "-ctk", "f16"),
        (mtp_model(), "--draft-tree", "6", "--strategy", "two-pass", "--draft-width", "3"),
    ):
        found = answer(capsys, *flags, "--drafter", dflash_file("causal"), *few)
        assert found["text"] == plain["text"]
        assert [*found["stats"]["sources"]] == ["dflash"]
        assert found["stats"]["sources"]["dflash"]["accepted"] >= 2
    assert inspect.main([str(stock_model()), "--drafter", str(dflash_file("causal"))]) == 0
    assert "3 layers, blocks of 8; 2 see the last 10 positions" in capsys.readouterr().out


MTP = ("-n", "12", "-c", "64")


def test_mtp_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    """Plans find the block that the model's file holds, or the one in a file of its own."""
    plain = answer(capsys, mtp_model(), "--strategy", "ar", *MTP)
    for flags in (
        (mtp_model(), "--strategy", "two-pass"),
        (mtp_model(), "--strategy", "ar", "--mtp", "--lookup"),
        (stock_model(), "-md", mtp_block(), "--draft-width", "2"),
        (mtp_model(), "--strategy", "two-pass", "--draft-ids", "250"),
    ):
        found = answer(capsys, *flags, *MTP)
        assert found["text"] == plain["text"]
        assert found["stats"]["sources"]["mtp"]["accepted"] >= 2
    assert "mtp" not in str(plain["stats"])


def test_mtp_bad_input(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        ((base, "--no-heads", "--mtp", "--strategy", "ar"), "--mtp: needs an MTP block: a model"),
        ((stock_model(), "--mtp", *MTP), "--mtp: needs an MTP block"),
        ((mtp_model(), "--draft-width", "10", *MTP), "must lie in 1..9"),
        ((mtp_model(), "--draft-ids", "271", *MTP), "--draft-ids 271: expected 1 to 270"),
        ((stock_model(), "--draft-ids", "9", *MTP), "there is no MTP block"),
        ((base, "--no-heads", "--drafter", mtp_block()), "is an MTP block of qwen35"),
        ((mtp_model(), "--no-mtp", "--strategy", "two-pass", *MTP), "no diffusion heads"),
    ):
        assert message in error(capsys, *flags)


def test_mtp_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    """What a block adds is told wherever it lies, and apart from the model."""
    for argv in ([mtp_model()], [stock_model(), "--drafter", mtp_block()]):
        assert inspect.main([*map(str, argv), "-c", "64"]) == 0
        shown = capsys.readouterr().out
        assert "1 layer, chains of up to 8" in shown
        assert "what the last layer gives" in shown
    assert inspect.main([str(stock_model())]) == 0
    assert "what the last layer gives" not in capsys.readouterr().out
