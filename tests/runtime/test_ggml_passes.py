"""What each pass feeds its graph, against brute force; shapes of graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from segment_lists import segment_lists

from orthrus_gguf.runtime.cache_layout import COLUMNS
from orthrus_gguf.runtime.ggml.cache_layout import columns_for
from orthrus_gguf.runtime.ggml.inputs import InputArrays, ShareArrays, ShareRows
from orthrus_gguf.runtime.ggml.shape import Shape, Share
from orthrus_gguf.runtime.passes import Piece, cut, wanted_rows
from orthrus_gguf.runtime.protocol import Segment, View, depths, path_to
from orthrus_gguf.runtime.trees import TreeLayout, padded_stores, tree_layout

OFFSETS = np.array([0, 1000, 2000])


@given(segment_lists(), st.integers(1, 40))
def test_inputs_say_who_sees_whom(segments: list[Segment], max_rows: int) -> None:
    """Row by row: where it stands, where its keys go, and exactly which keys it sees."""
    caches = list({id(segment.cache): segment.cache for segment in segments}.values())
    ends = [c.length + sum(rows_of(s) for s in segments if s.cache is c) for c in caches]
    for pieces in cut(segments, max_rows, 60):
        shares = [
            share_of([piece for piece in pieces if piece.segment.cache is cache], end)
            for cache, end in zip(caches, ends, strict=True)
            if any(piece.segment.cache is cache for piece in pieces)
        ]
        inputs = filled(pieces, shares)
        first = 0
        for piece in pieces:
            rows = slice(first, first + piece.count)
            assert inputs.tokens[rows].tolist() == list(piece.tokens)
            parents = piece.segment.parents
            steps = range(piece.count) if parents is None else depths(parents)
            assert inputs.positions[rows].tolist() == [piece.start + step for step in steps]
            first += piece.count
        assert first == len(inputs.tokens)
        if inputs.wanted is not None:
            assert inputs.wanted.tolist() == wanted_rows(pieces)
        for arrays, share in zip(inputs.shares, shares, strict=True):
            placed = arrays.key_rows[:, None] + OFFSETS
            np.testing.assert_array_equal(arrays.value_rows, placed)
            if share.tree is None:
                check_share(arrays, share)
            else:
                check_tree(arrays, share.tree)


def rows_of(segment: Segment) -> int:
    return len(segment) if segment.view is View.AR else 0


def share_of(pieces: Sequence[Piece], end: int) -> ShareRows:
    segment = pieces[0].segment
    parents = segment.parents
    return ShareRows(pieces, end, None if parents is None else tree_layout(parents, segment.start))


def check_share(arrays: ShareArrays, share: ShareRows) -> None:
    assert set(np.unique(arrays.mask).tolist()) <= {0.0, -np.inf}
    row = 0
    for piece in share.pieces:
        place = share.end + piece.offset
        block = set(range(place, place + piece.count))
        for i in range(piece.count):
            sees = set(np.flatnonzero(arrays.mask[row] == 0).tolist())
            if piece.segment.view is View.AR:
                assert arrays.key_rows[row] == piece.start + i
                assert sees == set(range(piece.start + i + 1))
            else:
                assert arrays.key_rows[row] == place + i
                assert sees == set(range(piece.segment.start)) | block
            row += 1
    assert row == len(arrays.mask)


def check_tree(arrays: ShareArrays, tree: TreeLayout) -> None:
    """Every row sees the text up to the edge and copies of what follows it, then its path."""
    assert arrays.stored is not None
    stored = dict(zip(arrays.key_rows.tolist(), arrays.stored.tolist(), strict=True))
    assert len(arrays.key_rows) % padded_stores(1) == 0
    for row in range(len(tree.parents)):
        columns = np.flatnonzero(arrays.mask[row] == 0).tolist()
        path = path_to(row, tree.parents)
        assert columns[: tree.edge] == list(range(tree.edge))
        beyond = columns[tree.edge :]
        home = tree.home[row]
        assert beyond == list(range(home, home + tree.start - tree.edge + len(path)))
        assert [stored[column] for column in beyond[tree.start - tree.edge :]] == path


def filled(pieces: Sequence[Piece], shares: Sequence[ShareRows]) -> InputArrays:
    """Input arrays full of rubbish, then filled."""
    rows, wanted = sum(piece.count for piece in pieces), len(wanted_rows(pieces))

    def arrays(share: ShareRows) -> ShareArrays:
        count = stores = sum(piece.count for piece in share.pieces)
        reach = share.end + 60
        if share.tree is not None:
            stores, reach = padded_stores(len(share.tree.stores)), share.tree.columns
        return ShareArrays(
            key_rows=np.full(stores, -7, np.int64),
            value_rows=np.full((stores, len(OFFSETS)), -7, np.int64),
            mask=np.full((count, columns_for(reach)), np.nan, np.float16),
            stored=None if share.tree is None else np.full(stores, -7, np.int32),
            element_offsets=OFFSETS,
        )

    inputs = InputArrays(
        tokens=np.full(rows, -7, np.int32),
        positions=np.full(rows, -7, np.int32),
        wanted=np.full(wanted, -7, np.int32) if 0 < wanted < rows else None,
        shares=tuple(map(arrays, shares)),
    )
    inputs.fill(pieces, shares)
    return inputs


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_spans_are_the_rows_of_a_pass(counts: list[tuple[int, int]]) -> None:
    """AR rows share by share, then diffusion rows share by share."""
    shares = tuple(Share(i, ar, diffusion, 64) for i, (ar, diffusion) in enumerate(counts))
    expected = [(View.AR, i, own) for i, (ar, _) in enumerate(counts) for own in range(ar)]
    expected += [
        (View.DIFFUSION, i, ar + own) for i, (ar, rows) in enumerate(counts) for own in range(rows)
    ]
    found: list[tuple[View, int, int]] = []
    for span in Shape(shares, 0).spans():
        assert span.first == len(found)
        for group in span.groups:
            assert group.first == len(found) - span.first
            found += [(span.view, group.share, group.own_first + i) for i in range(group.count)]
        assert span.count == len(found) - span.first
    assert found == expected
    assert Shape(shares, 0).rows == len(expected)


@given(st.integers(1, 1 << 20))
def test_columns_reach_far_enough_and_not_much_further(rows: int) -> None:
    columns = columns_for(rows)
    assert columns % COLUMNS == 0
    assert rows <= columns < max(rows + COLUMNS, 1.126 * rows)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 64), (64, 64), (65, 128), (512, 512), (513, 576), (1024, 1024)]
)
def test_columns(rows: int, columns: int) -> None:
    assert columns_for(rows) == columns
