"""Models on the native CPU kernels, for tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
from ggml_models import append, back_to, small_file
from orthrus_cpu_kernels.library import Kernels, NoKernelsError, load

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cpu.cache import CpuCache
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.protocol import ar_segment

__all__ = ["append", "back_to", "cache_of", "kernels", "loaded", "small_file"]

TYPES = gguf.GGMLQuantizationType


@functools.cache
def kernels() -> Kernels:
    """What this machine runs; skips the test where there is nothing."""
    try:
        return load()
    except NoKernelsError as error:
        pytest.skip(str(error))


@contextmanager
def loaded(path: Path, **settings: Any) -> Iterator[CpuModel]:
    """The model of a file, on one thread unless said."""
    own = settings.pop("kernels", None) or kernels()
    with (
        ModelFile.open(path) as file,
        CpuModel.load(file, own, **{"threads": 1, **settings}) as model,
    ):
        yield model


def cache_of(model: CpuModel, tokens: Sequence[int], capacity: int) -> CpuCache:
    """A cache that holds `tokens`."""
    cache = model.new_cache(capacity)
    if tokens:
        model.logits([ar_segment(cache, tokens, 0, wanted=range(0))])
        cache.commit(range(len(tokens)))
    return cache
