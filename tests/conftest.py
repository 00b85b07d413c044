"""Fixtures shared by all tests. Everything is made from the demo checkpoint in models/."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_file import make_file

# Kernels run in Triton's interpreter, which has to be chosen before any test module imports them.
# Tests of the compiler start a process of their own, without this variable.
os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Measured costs of passes go here, not to the cache of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("cache-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The demo checkpoint in the official Hugging Face layout. Never write into it."""
    return ROOT / "models" / "tiny-orthrus-stdlib"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Outputs of the official implementation (see tests/golden/README.md)."""
    data: dict[str, Any] = json.loads((ROOT / "tests/golden/tiny-orthrus-stdlib.json").read_text())
    return data


@pytest.fixture(scope="session")
def golden_logits() -> dict[str, Any]:
    """Float32 logits of the official implementation for the first three golden cases."""
    return dict(np.load(ROOT / "tests/golden/tiny-orthrus-stdlib.npz"))


@pytest.fixture(scope="session")
def demo_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`demo_file(type, split=False)`: the demo checkpoint as a GGUF, converted once per session.

    With `split`, the path of the base file; its heads are beside it (`<stem>-heads.gguf`).
    """
    folder = tmp_path_factory.mktemp("demo")

    def make(type_name: str, *, split: bool = False) -> Path:
        path = folder / f"demo-{type_name}{'-base' if split else ''}.gguf"
        if not path.exists():
            flags = ["--split"] if split else []
            make_file(checkpoint, path, "--type", type_name, *flags)
        return path

    return make
