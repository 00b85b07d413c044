"""orthrus-bench record and simulate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orthrus_gguf.bench.simulation.recording import load
from orthrus_gguf.cli.bench import main

FEW = ["--strategies", "two-pass,fused@x2,auto+no-lookup,auto"]


def test_chains_on_a_modelled_curve(capsys: pytest.CaptureFixture[str]) -> None:
    """Drafts of an MTP block, token by token; the curve is the one that BENCHMARKS.md names."""
    modelled = Path(__file__).resolve().parents[1] / "bench" / "modelled_desktop.json"
    argv = ["simulate", "--acceptance", "mtp-qwen3.5-9b", "--costs", str(modelled), "-o", "json"]
    assert main([*argv, "--strategies", "two-pass"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["simulations"]
    assert any("A token of a chain takes" in sentence for sentence in found["assumptions"])
    plain, drafted = found["outcomes"]
    assert [*drafted["sources"]] == ["mtp"]
    ratio = drafted["tokens_per_second"] / plain["tokens_per_second"]
    assert ratio == pytest.approx(drafted["tokens_per_cycle"] / (1 + 0.08 + 0.01), rel=0.02)


@pytest.fixture(scope="module")
def recorded(demo_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    prompts, path = folder / "prompts.json", folder / "demo.npz"
    prompts.write_text(json.dumps({"code": ["def f(", "class A:"], "prose": ["The"]}))
    words = ["record", str(demo_file("f32")), "-o", str(path), "--prompts", str(prompts)]
    assert main([*words, "-n", "24", "-t", "1", "--rows", "8", "--runtime", "cpu"]) == 0
    return path


def test_record(recorded: Path) -> None:
    recording = load(recorded)
    assert recording.origin.real
    assert recording.block_size == 16
    assert [text.domain for text in recording.texts] == ["code", "code", "prose"]
    for text in recording.texts:
        assert len(text.output) == 24
        assert sorted(text.blocks) == [8, 16]


def test_simulate_a_recording(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(recorded), "--costs", "flat,rtx-3090", *FEW]) == 0
    out = capsys.readouterr().out
    assert out.startswith("**SIMULATION, not a measurement**\n")
    assert "rows are free; drafts: " in out
    assert "RTX 3090, Qwen3-8B Q4_K_M, 512 tokens of context (predicted); drafts: " in out
    assert out.count("\nCheck: auto is never below ") == 2
    for name in ("ar", "two-pass@15", "fused@15x2", "auto", "auto+no-lookup", "bandit"):
        assert out.count(f"\n| {name} | ") == 2
    beneath = out[out.index("Assumptions (SIMULATION, not a measurement):") :]
    for word in ("virtual clock", "blocks of 8, 16 rows", "936 GB/s", "whatever its rows"):
        assert word in beneath


def test_json(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(recorded), "--costs", "h200", *FEW, "-o", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["label"] == "SIMULATION, not a measurement"
    (simulation,) = data["simulations"]
    assert len(simulation["outcomes"]) == 2 * 6
    assert {o["output_tokens"] for o in simulation["outcomes"]} == {1 + 2 * 23, 24}


def test_measured_costs(
    recorded: Path,
    demo_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model file is timed; what was remembered of it serves by itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = str(demo_file("f32"))
    assert main(["simulate", str(recorded), "--costs", model, "-t", "1", *FEW]) == 0
    assert "Costs of passes were measured here" in capsys.readouterr().out
    (curve,) = tmp_path.glob("orthrus-gguf/costs-*.json")
    assert main(["simulate", str(recorded), "--costs", str(curve), *FEW]) == 0
    assert f"measured before ({curve.name})" in capsys.readouterr().out


def test_errors_are_one_line(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    rec = str(recorded)
    for words, message in (
        (["--costs", "flat"], "name either a recording"),
        ([rec, "--acceptance", "qwen3-8b", "--costs", "flat"], "name either a recording"),
        ([rec, "--costs", "voodoo"], "--costs voodoo: expected one of rtx-3060, "),
        ([rec, "--costs", str(bad)], "not a measured cost curve"),
        ([rec, "--costs", "none.json"], "not a measured cost curve"),
        ([rec, "--costs", "none.gguf"], "none.gguf: no such file"),
        ([rec, "--costs", "flat", "--seed", "1"], "--seed goes with --acceptance"),
        ([rec, "--costs", "flat", "--strategies", "two-pass@99"], "must lie in 1..16"),
        ([str(bad), "--costs", "flat"], "not a recording"),
    ):
        assert main(["simulate", *words]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_record_errors(
    recorded: Path,
    demo_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, base = str(demo_file("f32")), str(demo_file("f32", split=True))
    capsys.readouterr()
    new = str(tmp_path / "new.npz")
    for words, message in (
        ([model, "-o", str(recorded)], "exists already"),
        ([base, "--no-heads", "-o", new], "no diffusion heads"),
        ([model, "-o", new, "--rows", "17"], "a block has 2 to 16 rows here"),
    ):
        assert main(["record", *words]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
