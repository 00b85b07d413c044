"""Fixtures of the fuzzing tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.seeds import write_base, write_heads
from tests.fuzz.target import check

#: `check` of tests/fuzz/target.py, with the counterparts filled in.
Check = Callable[[Path], str]


@pytest.fixture
def checker(tmp_path: Path) -> Check:
    """Does everything that the project does with a file; see `target.check`."""
    base, heads = write_base(tmp_path / "base.gguf"), write_heads(tmp_path / "heads.gguf")
    return lambda path: check(path, base, heads)
