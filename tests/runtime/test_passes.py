"""How segments become passes, against brute force; and which rows are paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from segment_lists import no_cache, parents_of_trees, segment_lists

from orthrus_gguf.runtime.passes import Piece, check_path, cut, wanted_rows
from orthrus_gguf.runtime.protocol import (
    Segment,
    View,
    ar_segment,
    check_segments,
    diffusion_segment,
    path_to,
)

Limits = st.tuples(st.integers(1, 40), st.integers(20, 60))


def is_dropped(segment: Segment) -> bool:
    return segment.view is View.DIFFUSION and not segment.wanted and not segment.taps


@given(segment_lists(), Limits)
def test_every_row_runs_once_and_in_order(segments: list[Segment], limits: tuple[int, int]) -> None:
    check_segments(segments)
    ran: dict[int, list[int]] = {}
    for pieces in cut(segments, *limits):
        assert pieces
        for piece in pieces:
            assert piece.segment is segments[piece.index]
            assert piece.tokens == piece.segment.tokens[piece.first :][: piece.count]
            assert piece.start == piece.segment.start + piece.first
            ran.setdefault(piece.index, []).extend(range(piece.first, piece.first + piece.count))
    for index, segment in enumerate(segments):
        assert ran.get(index, []) == ([] if is_dropped(segment) else list(range(len(segment))))


@given(segment_lists(), Limits)
def test_passes_keep_to_their_limits(segments: list[Segment], limits: tuple[int, int]) -> None:
    for pieces in cut(segments, *limits):
        chains = [piece for piece in pieces if piece.segment.view is View.AR]
        blocks = [piece for piece in pieces if piece.segment.view is View.DIFFUSION]
        rows = sum(piece.count for piece in chains)
        assert rows <= limits[0] or (len(chains) == 1 and chains[0].segment.parents is not None)
        assert sum(piece.count for piece in blocks) <= limits[1]


@given(segment_lists(), Limits)
def test_rows_lie_by_view_and_then_by_sequence(
    segments: list[Segment], limits: tuple[int, int]
) -> None:
    order = {id(segment.cache): None for segment in segments}
    rank = {cache: number for number, cache in enumerate(order)}
    for pieces in cut(segments, *limits):
        keys = [(p.segment.view is not View.AR, rank[id(p.segment.cache)]) for p in pieces]
        assert keys == sorted(keys)
        ar = [key for key in keys if not key[0]]
        assert len(set(ar)) == len(ar), "one AR piece per sequence"


@given(segment_lists(), Limits)
def test_trees_and_blocks_are_whole_and_blocks_come_late_enough(
    segments: list[Segment], limits: tuple[int, int]
) -> None:
    last_ar: dict[int, int] = {}
    ran: list[tuple[int, Piece]] = []
    for number, pieces in enumerate(cut(segments, *limits)):
        for piece in pieces:
            if piece.segment.view is View.AR:
                last_ar[id(piece.segment.cache)] = number
            if piece.segment.view is View.DIFFUSION or piece.segment.parents is not None:
                assert (piece.first, piece.count) == (0, len(piece.segment))
            ran.append((number, piece))
    for number, piece in ran:
        if piece.segment.view is View.DIFFUSION:
            assert number >= last_ar.get(id(piece.segment.cache), 0)


@given(segment_lists(), Limits)
def test_blocks_of_a_sequence_never_lie_on_one_another(
    segments: list[Segment], limits: tuple[int, int]
) -> None:
    for pieces in cut(segments, *limits):
        taken: set[tuple[int, int]] = set()
        for piece in pieces:
            if piece.segment.view is View.DIFFUSION:
                assert piece.offset + piece.count <= limits[1]
                cache = id(piece.segment.cache)
                rows = {(cache, piece.offset + i) for i in range(piece.count)}
                assert not rows & taken
                taken |= rows


@given(segment_lists(), Limits)
def test_where_blocks_lie_does_not_depend_on_company(
    segments: list[Segment], limits: tuple[int, int]
) -> None:
    """Nor on where AR rows are cut: drafts are the same bits, so statistics are the same."""
    offsets = {p.index: p.offset for pieces in cut(segments, *limits) for p in pieces}
    for cache in {id(segment.cache): segment.cache for segment in segments}.values():
        own = [index for index, segment in enumerate(segments) if segment.cache is cache]
        for pieces in cut([segments[index] for index in own], 1000, limits[1]):
            for piece in pieces:
                assert offsets[own[piece.index]] == piece.offset


@given(segment_lists(), Limits)
def test_wanted_rows_add_up(segments: list[Segment], limits: tuple[int, int]) -> None:
    found: dict[int, list[int]] = {}
    for pieces in cut(segments, *limits):
        counted, first = [], 0
        for piece in pieces:
            found.setdefault(piece.index, []).extend(piece.first + i for i in piece.wanted)
            counted += [first + i for i in piece.wanted]
            first += piece.count
        assert wanted_rows(pieces) == counted
    for index, segment in enumerate(segments):
        assert found.get(index, []) == list(segment.wanted)


def counts(segments: list[Segment], max_ar_rows: int, max_block_rows: int) -> list[list[int]]:
    passes = cut(segments, max_ar_rows, max_block_rows)
    return [[piece.count for piece in pieces] for pieces in passes]


def test_blocks_share_the_pass_of_the_last_ar_rows() -> None:
    cache = no_cache(0)
    blocks = [diffusion_segment(cache, 1, 2, 16, 70) for _ in range(5)]
    segments = [ar_segment(cache, range(70), 0), *blocks]
    assert counts(segments, 32, 64) == [[32], [32], [6, 16, 16, 16, 16], [16]]


def test_sequences_share_passes() -> None:
    """A prompt between two short sequences: every pass is full, blocks ride as early as may be."""
    caches = [no_cache(9), no_cache(0), no_cache(9)]
    segments = [
        ar_segment(caches[0], range(4), 9),
        diffusion_segment(caches[0], 1, 2, 16, 13),
        ar_segment(caches[1], range(70), 0),
        ar_segment(caches[2], range(5), 9),
        diffusion_segment(caches[2], 1, 2, 16, 14),
    ]
    assert counts(segments, 32, 64) == [[4, 28, 16], [32], [10, 5, 16]]


def test_a_tree_is_not_cut() -> None:
    caches = [no_cache(9) for _ in range(3)]
    segments = [
        ar_segment(caches[0], range(10), 9),
        ar_segment(caches[1], range(30), 9, parents=[-1, *range(29)]),
        ar_segment(caches[2], range(50), 9, parents=[-1, *range(49)]),
    ]
    assert counts(segments, 32, 64) == [[10], [30], [50]]
    assert counts(segments[:2], 40, 64) == [[10, 30]]


def test_a_block_that_only_taps_ask_about_runs() -> None:
    cache = no_cache(9)
    block = Segment(cache, View.DIFFUSION, (1, 2, 2), 9, range(0), taps=(1,))
    assert counts([block], 32, 64) == [[3]]
    assert cut([Segment(cache, View.DIFFUSION, (1, 2, 2), 9, range(0))], 32, 64) == []


# --- paths ---


@given(parents_of_trees(), st.data())
def test_paths_of_trees(parents: list[int], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(parents) - 1))
    path = path_to(row, parents)
    check_path(path, len(parents), parents)
    check_path([], len(parents), parents)
    others = st.lists(st.integers(-2, len(parents) + 1), min_size=1, max_size=6)
    rows = data.draw(others)
    known = [path_to(i, parents) for i in range(len(parents))]
    if rows not in known:
        with pytest.raises(ValueError, match="no path of the tree"):
            check_path(rows, len(parents), parents)


@given(st.integers(1, 9), st.lists(st.integers(-2, 9), max_size=9))
def test_paths_of_chains(count: int, rows: list[int]) -> None:
    if len(rows) <= count and rows == list(range(len(rows))):
        check_path(rows, count, None)
    else:
        with pytest.raises(ValueError, match=f"not the first of {count}"):
            check_path(rows, count, None)
    check_path(range(count), count, None)
