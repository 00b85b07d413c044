"""Several sequences in one pass, on any runtime in host memory: every row gives the bits of its
sequence's own pass.

Sequences are of different lengths, on both sides of edges of groups of columns; their segments come
in any order that the protocol allows, and with few rows per pass they are cut in other places than
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from ggml_models import append, back_to, cache_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from segment_lists import mixed, of_one_sequence

from orthrus_gguf.runtime.host_model import HostModel
from orthrus_gguf.runtime.protocol import (
    Cache,
    Logits,
    Segment,
    View,
    ar_segment,
    diffusion_segment,
    path_to,
)

AnyModel = HostModel[Any]

TOKENS: list[int] = np.random.default_rng(0).integers(0, 300, 300).tolist()
MASK = 319
LENGTHS = st.sampled_from((0, 3, 40, 58, 63, 64, 65, 100, 127, 128, 190))


@st.composite
def companies(draw: st.DrawFn, model: AnyModel) -> list[Segment]:
    """Segments of two to five sequences of this model."""
    caches = [
        cache_of(model, TOKENS[:length], 4096)
        for length in draw(st.lists(LENGTHS, min_size=2, max_size=5))
    ]
    return draw(mixed([draw(of_one_sequence(cache, MASK)) for cache in caches]))


def by_sequence(segments: Sequence[Segment]) -> list[list[int]]:
    """Numbers of the segments of each sequence."""
    found: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        found.setdefault(id(segment.cache), []).append(number)
    return list(found.values())


def assert_company_changes_nothing(
    model: AnyModel, segments: Sequence[Segment], data: st.DataObject, batch_rows: int
) -> None:
    alone: dict[int, Logits] = {}
    for numbers in by_sequence(segments):
        own = model.logits([segments[number] for number in numbers])
        alone.update(zip(numbers, own, strict=True))
    usual, model._batch_rows = model._batch_rows, batch_rows
    try:
        together = model.logits(segments)
    finally:
        model._batch_rows = usual
    for number, logits in enumerate(together):
        what = f"{segments[number].view.value} rows of segment {number}"
        np.testing.assert_array_equal(logits, alone[number], what)
    for segment in segments:
        if segment.view is View.AR:
            assert_committed_rows_are_its_own(model, segment, data)


def assert_committed_rows_are_its_own(
    model: AnyModel, segment: Segment, data: st.DataObject
) -> None:
    """Any path of a segment that ran in company, against the same tokens one by one."""
    cache, start = cast(Cache, segment.cache), segment.start
    assert cache.length == start
    row = data.draw(st.integers(-1, len(segment) - 1))
    path = list(range(row + 1))
    if segment.parents is not None and path:
        path = path_to(row, segment.parents)
    cache.commit(path)
    assert cache.length == start + len(path)
    behind = model.logits([ar_segment(cache, [7], cache.length)])[0]
    back_to(cache, start)
    for i in path:
        append(model, cache, [segment.tokens[i]])
    np.testing.assert_array_equal(append(model, cache, [7]), behind, "behind")


def check_examples(model: AnyModel, examples: int) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(companies(model), st.sampled_from((5, 40, 64)), st.data())
    def check(segments: list[Segment], batch_rows: int, data: st.DataObject) -> None:
        assert_company_changes_nothing(model, segments, data, batch_rows)

    check()


def a_company(model: AnyModel) -> list[Segment]:
    """A fixed one, for tests that must fail: prompts and blocks of three sequences."""
    caches = [cache_of(model, TOKENS[:length], 4096) for length in (58, 64, 100)]
    segments = [ar_segment(cache, TOKENS[:20], cache.length) for cache in caches]
    return segments + [
        diffusion_segment(cache, 5, MASK, 16, cache.length + 20 - i)
        for i in range(3)
        for cache in caches
    ]


def assert_company_changes_nothing_here(model: AnyModel) -> None:
    data = st.data()

    @settings(deadline=None, max_examples=1, database=None, phases=[Phase.generate])
    @given(data)
    def check(data: st.DataObject) -> None:
        assert_company_changes_nothing(model, a_company(model), data, 30)

    check()
