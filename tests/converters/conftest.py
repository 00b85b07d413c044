"""Fixtures of the converter tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hf_checkpoint import write_checkpoint
from orthrus_converters.cli import main


@dataclass(frozen=True)
class Run:
    """What a run of the command left: exit code, both streams, files in the output folder."""

    code: int
    stdout: str
    stderr: str
    files: list[str]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small synthetic checkpoint of the test's own, free to be damaged."""
    return write_checkpoint(tmp_path / "tiny")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for output."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def convert(out: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`convert(folder, *flags)`: run the command in this process, writing `out/model.gguf`."""

    def run(folder: Path, *flags: str) -> Run:
        argv: Sequence[str] = [str(folder), str(out / "model.gguf"), *flags]
        try:
            code = main(argv)
        except SystemExit as stop:  # argparse
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        files = sorted(path.name for path in out.iterdir())
        return Run(code, captured.out, captured.err, files)

    return run
