"""orthrus-bench --synthetic: makes a file, measures it, and says everywhere what it is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orthrus_gguf.cli.bench import main
from orthrus_gguf.cli.run import main as run
from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.model.shapes import QWEN3_SHAPES

FLAGS = ("-t", "1", "-p", "4", "-n", "2", "--rows", "2", "-r", "1")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = replace(
        QWEN3_SHAPES["qwen3-0.6b"],
        name="tiny",
        n_layers=2,
        n_embd=256,
        n_ff=256,
        n_head=2,
        n_head_kv=1,
        head_dim=64,
        n_vocab=400,
        mask_token=399,
    )
    monkeypatch.setitem(QWEN3_SHAPES, "tiny", tiny)
    monkeypatch.chdir(tmp_path)


def test_make_and_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--synthetic", "tiny", "--type", "Q8_0", *FLAGS]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("synthetic tiny Q8_0 (random weights), ")
    assert out.splitlines()[2] == "**synthetic: random weights, so only times mean anything**"
    assert "| tg2 |" in out
    assert err.startswith("synthetic-tiny-q8_0.gguf: wrote 0.00 GB in ")
    assert "synthetic: random weights" in err

    assert main(["synthetic-tiny-q8_0.gguf", *FLAGS, "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["synthetic"] is True
    assert "synthetic" in report["model"]
    assert main(["synthetic-tiny-q8_0.gguf", *FLAGS, "-o", "csv"]) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert {row["synthetic"] for row in rows} == {"True"}

    assert run(["synthetic-tiny-q8_0.gguf", "-t", "1", "-p", "Hello", "-n", "3"]) == 0
    assert "synthetic tiny Q8_0 (random weights) on cpu" in capsys.readouterr().err


def test_make_only(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--synthetic", "tiny", "--make-only", "--seed", "7"]
    assert main([*flags, "mine.gguf"]) == 0
    assert capsys.readouterr().out == "mine.gguf\n"
    with GGUFFile.open("mine.gguf") as file:
        assert file.metadata["orthrus.synthetic.seed"] == 7
        assert file.metadata["general.file_type"] == 15  # Q4_K_M is what one gets unasked
    assert main([*flags, "-m", "other.gguf"]) == 0
    assert Path("other.gguf").read_bytes() == Path("mine.gguf").read_bytes()


def test_other_models_are_not_called_synthetic(
    demo_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(demo_file("f16"))
    capsys.readouterr()
    assert main([model, *FLAGS]) == 0
    assert "synthetic" not in capsys.readouterr().out
    assert main([model, *FLAGS, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["synthetic"] is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--synthetic", "big"], "--synthetic big: expected one of qwen3-0.6b, "),
        (["--synthetic", "tiny", "--type", "q9"], "--type q9: expected one of f32, "),
        (["--synthetic", "tiny", "--seed", str(2**32)], "--seed 4294967296: expected 0 to"),
        (["--synthetic", "tiny", "taken.gguf"], "taken.gguf: exists already; measure it with"),
        (["--synthetic", "tiny", "no/x.gguf"], "no/x.gguf: there is no folder no; create it"),
        (["--synthetic", "tiny", "--heads", "h.gguf"], "--heads: a synthetic model has heads"),
        (["--synthetic", "tiny", "a", "-m", "b"], "name one model file"),
        (["taken.gguf", "--type", "q8_0"], "--type goes with --synthetic NAME"),
        (["taken.gguf", "--seed", "0"], "--seed goes with --synthetic NAME"),
        (["taken.gguf", "--make-only"], "--make-only goes with --synthetic NAME"),
    ],
)
def test_errors_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken.gguf").write_bytes(b"mine")
    assert main(flags) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"orthrus-bench: error: {message}")
    assert err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["taken.gguf"]
    assert Path("taken.gguf").read_bytes() == b"mine"
