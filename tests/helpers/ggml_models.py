"""Models on the ggml runtime, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import gguf
from synthetic_model import model_shape, uniform, write_model

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.host_cache import HostCache
from orthrus_gguf.runtime.host_model import HostModel
from orthrus_gguf.runtime.protocol import Cache, Logits, Model, Segment, ar_segment

TYPES = gguf.GGMLQuantizationType

C = TypeVar("C", bound=HostCache)


@contextmanager
def loaded(path: Path, **settings: Any) -> Iterator[GgmlModel]:
    """The model of a file, on one thread unless said."""
    with (
        ModelFile.open(path) as file,
        GgmlModel.load(file, **{"threads": 1, **settings}) as model,
    ):
        yield model


def small_file(
    folder: Path, qtype: gguf.GGMLQuantizationType, config: ModelConfig | None = None
) -> Path:
    """A small model with random weights, all of one type."""
    path = folder / f"{qtype.name}.gguf"
    write_model(load_library().api, path, config or model_shape(), uniform(qtype))
    return path


def cache_of(model: HostModel[C], tokens: Sequence[int], capacity: int) -> C:
    """A cache that holds `tokens`."""
    cache = model.new_cache(capacity)
    if tokens:
        model.logits([ar_segment(cache, tokens, 0, wanted=range(0))])
        cache.commit(range(len(tokens)))
    return cache


def append(model: Model, cache: Cache, tokens: Sequence[int], *others: Segment) -> Logits:
    """Logits of `tokens` behind what the cache holds, which are committed; in company of others."""
    segment = ar_segment(cache, tokens, cache.length)
    logits = model.logits([segment, *others])[0]
    cache.commit(range(len(tokens)))
    return logits


def back_to(cache: Cache, length: int) -> None:
    """Keep the first rows of a cache."""
    cache.restore(cache.checkpoint(length))
