"""orthrus-bench --synthetic: has a file made, measures it, and says everywhere what it is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orthrus_gguf.cli.bench import main
from orthrus_gguf.cli.run import main as run
from orthrus_gguf.gguf.reader import GGUFFile

FLAGS = ("-t", "1", "-p", "4", "-n", "2", "--rows", "2", "-r", "1")


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_make_and_measure(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--synthetic", "smollm2-135m", "--type", "Q8_0", *FLAGS]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("synthetic SmolLM2-135M Q8_0 (random weights), ")
    assert out.splitlines()[2] == "**synthetic: random weights, so only times mean anything**"
    assert "| tg2 |" in out
    name = "synthetic-smollm2-135m-q8_0.gguf"
    assert err.startswith(f"{name}: wrote 0.17 GB in ")
    assert "synthetic: random weights" in err

    assert main([name, *FLAGS, "-o", "json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["synthetic"] is True
    assert "synthetic" in report["model"]
    assert main([name, *FLAGS, "-o", "csv"]) == 0
    rows = csv.DictReader(io.StringIO(capfd.readouterr().out))
    assert {row["synthetic"] for row in rows} == {"True"}

    assert run([name, "-t", "1", "-p", "Hello", "-n", "3"]) == 0
    assert "synthetic SmolLM2-135M Q8_0 (random weights) on cpu" in capfd.readouterr().err


def test_make_only(capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--synthetic", "smollm2-135m", "--make-only", "--seed", "7"]
    assert main([*flags, "mine.gguf"]) == 0
    assert capfd.readouterr().out == "mine.gguf\n"
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
        (
            ["--synthetic", "smollm2-135m", "taken.gguf"],
            "taken.gguf: exists already; measure it with",
        ),
        (
            ["--synthetic", "smollm2-135m", "--heads", "h.gguf"],
            "--heads: a synthetic model has heads",
        ),
        (["--synthetic", "smollm2-135m", "a", "-m", "b"], "name one model file"),
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--type", "q9"], "argument --type/--outtype: invalid choice: 'q9'"),
        (["--type", "iq1_m"], "--type iq1_m: no random qblocks"),
        (["--seed", str(2**32)], "--seed 4294967296: expected 0 to"),
        (["no/x.gguf"], "no/x.gguf: there is no folder no; create it"),
    ],
)
def test_what_the_converter_says(
    flags: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same line as from the command that the flag is short for, and its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["--synthetic", "smollm2-135m", *flags])
    assert stop.value.code == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"orthrus-convert: error: {message}")
    assert err.count("\n") == 1
    assert list(Path().iterdir()) == []
