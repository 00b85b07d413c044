"""Kernels compiled beside the loading of weights: what is said, and what happens when it fails."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from orthrus_gguf.runtime.cuda import compiling

WHAT = "compiling the kernels for a card"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache; modules of the test lie there, too."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(folder: Path, code: str, arguments: tuple[str, ...] = ("86",)) -> list[str]:
    """Lines that are said while a stand-in for `compile_ahead` runs beside nothing."""
    (folder / "stand_in_compiler.py").write_text(code)
    said: list[str] = []
    with compiling.compiled(arguments, WHAT, said.append, module="stand_in_compiler"):
        pass
    return said


def test_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "INTERVAL", 0.0)
    code = "import sys\nfor i in (1, 2): print(i, 'of 2 kernel', sys.argv[1], flush=True)"
    said = run(folder, code)
    assert said[0] == f"{WHAT} (once; they are kept in {folder})"
    assert said[1:3] == [f"{WHAT}: 1 of 2", f"{WHAT}: 2 of 2"]
    assert said[3].startswith("2 kernels compiled in ")
    assert run(folder, "raise SystemExit(9)") == [], "it is known to be done"
    assert len(run(folder, code, ("90",))) == 4, "not for another card"


def test_failure_is_one_line_and_is_tried_again(folder: Path) -> None:
    for _ in range(2):
        said = run(folder, "raise ArithmeticError('no such instruction')")
        assert len(said) == 2
        assert said[1] == (
            f"{WHAT} ahead failed, they compile when first used: "
            "ArithmeticError: no such instruction"
        )


def test_an_error_while_loading_ends_it(folder: Path) -> None:
    (folder / "stand_in_compiler.py").write_text("import time\ntime.sleep(60)")
    began = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        compiling.compiled((), WHAT, lambda line: None, module="stand_in_compiler"),
    ):
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30
    assert sys.modules.get("stand_in_compiler") is None
