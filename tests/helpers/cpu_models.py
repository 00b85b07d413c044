"""Models on the native CPU kernels, for tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ggml_models import TYPES, append, back_to, cache_of, small_file
from orthrus_cpu_kernels.library import Kernels, NoKernelsError, load

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cpu.model import CpuModel

__all__ = ["TYPES", "append", "back_to", "cache_of", "kernels", "loaded", "small_file"]


@functools.cache
def kernels() -> Kernels:
    """What this machine runs; skips the test where there is nothing."""
    try:
        return load()
    except NoKernelsError as error:
        pytest.skip(str(error))


@contextmanager
def loaded(path: Path, **settings: Any) -> Iterator[CpuModel]:
    """The model of a file, whole, on one thread unless said."""
    own = settings.pop("kernels", None) or kernels()
    with (
        ModelFile.open(path) as file,
        CpuModel.load(file, own, **{"threads": 1, **settings}) as model,
    ):
        model.wait()
        yield model
