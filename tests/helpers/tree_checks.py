"""Trees on any runtime in host memory: each row gives the bits that it gives when its path is the
text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from ggml_models import append, back_to, cache_of
from numpy.typing import NDArray

from orthrus_gguf.runtime.host_cache import HostCache
from orthrus_gguf.runtime.host_model import HostModel
from orthrus_gguf.runtime.protocol import ar_segment, path_to

AnyModel = HostModel[Any]

TOKENS: list[int] = np.random.default_rng(0).integers(0, 300, 300).tolist()

#: A trunk of five rows, and branches from its root, its middle and its end, one of them forked.
TREE = (-1, 0, 1, 2, 3, 0, 5, 6, 2, 8, 6, 4, 4)

#: Around the edges of groups of columns, where regions start, end, and need a second group.
STARTS = (1, 7, 58, 62, 63, 64, 65, 120, 127, 128, 190)


def cache_at(model: AnyModel, start: int, capacity: int = 4096) -> Any:
    return cache_of(model, TOKENS[:start], capacity)


def row_tokens(parents: Sequence[int], seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(300), k=len(parents))


def one_by_one(model: AnyModel, cache: HostCache, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits of `tokens` behind what the cache holds, each in a pass of its own."""
    place = cache.checkpoint()
    rows = [append(model, cache, [token]) for token in tokens]
    cache.restore(place)
    return np.concatenate(rows)


def assert_bits(model: AnyModel, start: int, parents: Sequence[int], seed: int = 0) -> None:
    """Every row of a tree against the same path as plain rows; then go on from each leaf."""
    tokens = row_tokens(parents, seed)
    cache, plain = cache_at(model, start), cache_at(model, start)
    leaves = [row for row in range(len(parents)) if row not in parents]
    for leaf in leaves:
        (logits,) = model.logits([ar_segment(cache, tokens, start, parents=parents)])
        assert cache.length == start
        path = path_to(leaf, parents)
        following = [5, 6, 7]
        alone = one_by_one(model, plain, [tokens[row] for row in path] + following)
        np.testing.assert_array_equal(logits[path], alone[: len(path)], f"{start}, path {path}")
        cache.commit(path)
        assert cache.length == start + len(path)
        behind = one_by_one(model, cache, following)
        np.testing.assert_array_equal(behind, alone[len(path) :], f"{start}, behind {path}")
        back_to(cache, start)
