"""How segments become passes, and what each pass feeds its graph, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from orthrus_gguf.runtime.ggml.cache_layout import COLUMNS, columns_for
from orthrus_gguf.runtime.ggml.inputs import InputArrays, wanted_rows
from orthrus_gguf.runtime.ggml.passes import Piece, cut
from orthrus_gguf.runtime.protocol import Segment, View, ar_segment, diffusion_segment


@st.composite
def segment_lists(draw: st.DrawFn) -> tuple[int, list[Segment]]:
    """(cache length, segments that `check_segments` would accept)."""
    length = draw(st.integers(0, 40))
    segments: list[Segment] = []
    visible = length

    def wanted(rows: int) -> range:
        low = draw(st.integers(0, rows))
        return range(low, draw(st.integers(low, rows)))

    if draw(st.booleans()):
        rows = draw(st.integers(1, 50))
        segments.append(ar_segment(range(100, 100 + rows), length, wanted=wanted(rows)))
        visible += rows
    for _ in range(draw(st.integers(0 if segments else 1, 4))):
        rows = draw(st.integers(1, 20))
        start = draw(st.integers(0, visible))
        segments.append(diffusion_segment(7, 9, rows, start, wanted=wanted(rows)))
    return length, segments


@given(segment_lists(), st.integers(1, 40), st.integers(20, 60))
def test_every_row_runs_once_and_in_order(
    case: tuple[int, list[Segment]], max_ar_rows: int, max_block_rows: int
) -> None:
    _, segments = case
    passes = cut(segments, max_ar_rows, max_block_rows)
    ran: dict[int, list[int]] = {}
    for pieces in passes:
        assert pieces
        blocks = [piece for piece in pieces if piece.segment.view is View.DIFFUSION]
        assert sum(piece.count for piece in blocks) <= max_block_rows
        for number, piece in enumerate(pieces):
            assert piece.segment is segments[piece.index]
            if piece.segment.view is View.AR:
                assert number == 0
                assert piece.count <= max_ar_rows
            ran.setdefault(piece.index, []).extend(range(piece.first, piece.first + piece.count))
    order = [piece.index for pieces in passes for piece in pieces]
    assert order == sorted(order)
    for index, segment in enumerate(segments):
        dropped = segment.view is View.DIFFUSION and not segment.wanted
        assert ran.get(index, []) == ([] if dropped else list(range(len(segment))))


@given(segment_lists(), st.integers(1, 40))
def test_wanted_rows_add_up(case: tuple[int, list[Segment]], max_rows: int) -> None:
    found: dict[int, list[int]] = {}
    for pieces in cut(case[1], max_rows, 60):
        for piece in pieces:
            found.setdefault(piece.index, []).extend(piece.first + i for i in piece.wanted)
    for index, segment in enumerate(case[1]):
        assert found.get(index, []) == list(segment.wanted)


@given(segment_lists(), st.integers(1, 40))
def test_inputs_say_who_sees_whom(case: tuple[int, list[Segment]], max_rows: int) -> None:
    """Row by row: where it stands, where its keys go, and exactly which keys it sees."""
    length, segments = case
    offsets = np.array([0, 1000, 2000])
    for pieces in cut(segments, max_rows, 60):
        inputs = filled(pieces, length, offsets)
        committed = length + sum(p.count for p in pieces if p.segment.view is View.AR)
        row, spare = 0, committed
        for piece in pieces:
            start = piece.segment.start + piece.first
            block = set(range(spare, spare + piece.count))
            for i in range(piece.count):
                sees = set(np.flatnonzero(inputs.mask[row] == 0).tolist())
                assert set(np.unique(inputs.mask[row]).tolist()) <= {0.0, -np.inf}
                assert inputs.tokens[row] == piece.segment.tokens[piece.first + i]
                assert inputs.positions[row] == start + i
                if piece.segment.view is View.AR:
                    assert inputs.key_rows[row] == start + i
                    assert sees == set(range(start + i + 1))
                else:
                    assert inputs.key_rows[row] == spare + i
                    assert sees == set(range(piece.segment.start)) | block
                placed = inputs.value_rows[3 * row : 3 * row + 3]
                assert placed.tolist() == (inputs.key_rows[row] + offsets).tolist()
                row += 1
            if piece.segment.view is View.DIFFUSION:
                spare += piece.count
        assert row == len(inputs.tokens)
        if inputs.wanted is not None:
            assert inputs.wanted.tolist() == wanted_rows(pieces)
        length = committed


def filled(pieces: list[Piece], length: int, offsets: NDArray[np.int64]) -> InputArrays:
    """Input arrays full of rubbish, then filled."""
    rows, wanted = sum(piece.count for piece in pieces), len(wanted_rows(pieces))
    inputs = InputArrays(
        tokens=np.full(rows, -7, np.int32),
        positions=np.full(rows, -7, np.int32),
        key_rows=np.full(rows, -7, np.int64),
        value_rows=np.full(rows * len(offsets), -7, np.int64),
        mask=np.full((rows, columns_for(length + rows)), np.nan, np.float16),
        wanted=np.full(wanted, -7, np.int32) if 0 < wanted < rows else None,
    )
    inputs.fill(pieces, length, offsets)
    return inputs


def test_blocks_share_the_pass_of_the_last_ar_rows() -> None:
    segments = [ar_segment(range(70), 0), *(diffusion_segment(1, 2, 16, 70) for _ in range(5))]
    shapes = [[piece.count for piece in pieces] for pieces in cut(segments, 32, 64)]
    assert shapes == [[32], [32], [6, 16, 16, 16, 16], [16]]


def test_wanted_rows_count_over_all_pieces() -> None:
    segments = [
        ar_segment(range(5), 0, wanted=range(3, 5)),
        diffusion_segment(1, 2, 4, 5, wanted=range(1, 3)),
    ]
    (pieces,) = cut(segments, 32, 32)
    assert wanted_rows(pieces) == [3, 4, 6, 7]


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
