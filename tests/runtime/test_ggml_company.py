"""Several sequences in one pass: every row gives the bits of its sequence's own pass.

Blocks too: drafts, and with them statistics, must not depend on who else is served. Sequences are
of different lengths, on both sides of edges of groups of columns; their segments come in any order
that the protocol allows, and with few rows per pass they are cut in other places than alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from ggml_models import append, back_to, cache_of, loaded, small_file
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from segment_lists import mixed, of_one_sequence

from orthrus_gguf.runtime import host_model
from orthrus_gguf.runtime.ggml import sequences
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.passes import Piece, cut
from orthrus_gguf.runtime.protocol import (
    Logits,
    Segment,
    View,
    ar_segment,
    diffusion_segment,
    path_to,
)

TOKENS: list[int] = np.random.default_rng(0).integers(0, 300, 300).tolist()
MASK = 319
CACHE_PAIRS = list(product(CACHE_TYPES, CACHE_TYPES))
LENGTHS = st.sampled_from((0, 3, 40, 58, 63, 64, 65, 100, 127, 128, 190))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Products with quantized weights round rows to bytes, which hides small differences.
    return small_file(tmp_path_factory.mktemp("company"), gguf.GGMLQuantizationType.F32)


@st.composite
def companies(draw: st.DrawFn, model: GgmlModel) -> list[Segment]:
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
    model: GgmlModel, segments: Sequence[Segment], data: st.DataObject, batch_rows: int
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
    model: GgmlModel, segment: Segment, data: st.DataObject
) -> None:
    """Any path of a segment that ran in company, against the same tokens one by one."""
    cache, start = segment.cache, segment.start
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


def check_examples(model: GgmlModel, examples: int) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(companies(model), st.sampled_from((5, 40, 64)), st.data())
    def check(segments: list[Segment], batch_rows: int, data: st.DataObject) -> None:
        assert_company_changes_nothing(model, segments, data, batch_rows)

    check()


@pytest.mark.parametrize(("k", "v"), CACHE_PAIRS)
def test_every_cache_type(path: Path, k: str, v: str) -> None:
    with loaded(path, cache_type_k=k, cache_type_v=v) as model:
        check_examples(model, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "v"), CACHE_PAIRS)
def test_every_cache_type_at_length(path: Path, k: str, v: str) -> None:
    with loaded(path, cache_type_k=k, cache_type_v=v) as model:
        check_examples(model, 200)


def test_several_threads(path: Path) -> None:
    with loaded(path, threads=2) as model:
        check_examples(model, 2)


def test_quantized_weights(tmp_path: Path) -> None:
    with loaded(small_file(tmp_path, gguf.GGMLQuantizationType.Q4_K)) as model:
        check_examples(model, 10)


def a_company(model: GgmlModel) -> list[Segment]:
    """A fixed one, for tests that must fail: prompts and blocks of three sequences."""
    caches = [cache_of(model, TOKENS[:length], 4096) for length in (58, 64, 100)]
    segments = [ar_segment(cache, TOKENS[:20], cache.length) for cache in caches]
    return segments + [
        diffusion_segment(cache, 5, MASK, 16, cache.length + 20 - i)
        for i in range(3)
        for cache in caches
    ]


def assert_company_changes_nothing_here(model: GgmlModel) -> None:
    data = st.data()

    @settings(deadline=None, max_examples=1, database=None, phases=[Phase.generate])
    @given(data)
    def check(data: st.DataObject) -> None:
        assert_company_changes_nothing(model, a_company(model), data, 30)

    check()


def test_the_fixed_company_is_fine(path: Path) -> None:
    with loaded(path) as model:
        assert_company_changes_nothing_here(model)


# --- that these tests can fail ---


def test_blocks_out_of_place_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks one behind the other as they come in the pass, whosesoever they are."""

    def packed(*args: Any) -> list[list[Piece]]:
        passes = cut(*args)
        for pieces in passes:
            taken = 0
            for number, piece in enumerate(pieces):
                if piece.segment.view is View.DIFFUSION:
                    pieces[number] = replace(piece, offset=taken)
                    taken += piece.count
        return passes

    monkeypatch.setattr(host_model, "cut", packed)
    with loaded(path) as model, pytest.raises(AssertionError, match="diffusion rows"):
        assert_company_changes_nothing_here(model)


def test_ragged_column_counts_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "columns_for", lambda rows: rows)
    with loaded(path) as model, pytest.raises(AssertionError, match="ar rows"):
        assert_company_changes_nothing_here(model)
