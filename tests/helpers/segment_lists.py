"""Hypothesis strategies for the segments of one call: several sequences, all that is allowed."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import cast

from hypothesis import strategies as st

from orthrus_gguf.runtime.protocol import Cache, Segment, ar_segment, diffusion_segment


def no_cache(length: int) -> Cache:
    """Stands for a cache of so many rows; it holds nothing."""
    return cast(Cache, SimpleNamespace(length=length, capacity=1 << 20))


@st.composite
def parents_of_trees(draw: st.DrawFn, most: int = 24) -> list[int]:
    """A tree of up to `most` rows."""
    rows = draw(st.integers(1, most))
    return [-1, *(draw(st.integers(0, i)) for i in range(rows - 1))]


@st.composite
def ranges(draw: st.DrawFn, rows: int) -> range:
    low = draw(st.integers(0, rows))
    return range(low, draw(st.integers(low, rows)))


@st.composite
def of_one_sequence(draw: st.DrawFn, cache: Cache, last_token: int) -> list[Segment]:
    """A chain or a tree, blocks, or a chain and blocks. last_token: the mask token."""

    rng = random.Random(draw(st.integers(0, 1 << 16)))

    def tokens(rows: int) -> list[int]:
        return rng.choices(range(last_token), k=rows)

    kind = draw(st.sampled_from(("chain", "tree", "blocks")))
    start = visible = cache.length
    segments: list[Segment] = []
    if kind == "tree":
        parents = draw(parents_of_trees())
        rows = len(parents)
        return [ar_segment(cache, tokens(rows), start, parents=parents, wanted=draw(ranges(rows)))]
    if kind == "chain":
        rows = draw(st.integers(1, 50))
        segments.append(ar_segment(cache, tokens(rows), start, wanted=draw(ranges(rows))))
        visible += rows
    for _ in range(draw(st.integers(0 if segments else 1, 4))):
        rows, at = draw(st.integers(1, 20)), draw(st.integers(0, visible))
        (anchor,) = tokens(1)
        wanted = draw(ranges(rows))
        segments.append(diffusion_segment(cache, anchor, last_token, rows, at, wanted=wanted))
    return segments


@st.composite
def mixed(draw: st.DrawFn, sequences: list[list[Segment]]) -> list[Segment]:
    """The segments of all sequences in any order that keeps each sequence's own."""
    left = [list(segments) for segments in sequences if segments]
    found = []
    while left:
        number = draw(st.integers(0, len(left) - 1))
        found.append(left[number].pop(0))
        left = [segments for segments in left if segments]
    return found


@st.composite
def segment_lists(draw: st.DrawFn, most: int = 4) -> list[Segment]:
    """Segments of up to `most` sequences that `check_segments` accepts; nobody's caches."""
    caches = [no_cache(draw(st.integers(0, 40))) for _ in range(draw(st.integers(1, most)))]
    return draw(mixed([draw(of_one_sequence(cache, 160)) for cache in caches]))
