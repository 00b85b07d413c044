"""How the segments of one `forward` call are cut into passes, and the table that describes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from orthrus_kernels.elementwise.rows import AR, DIFFUSION, SEGMENT_SIZE
from orthrus_kernels.products.dispatch import MAX_ROWS

from orthrus_gguf.runtime.protocol import Segment, View

_VIEWS = {View.AR: AR, View.DIFFUSION: DIFFUSION}


@dataclass(frozen=True)
class Piece:
    """`count` rows of a segment from its row `first` on, which run in one pass."""

    index: int
    segment: Segment
    first: int
    count: int

    @property
    def wanted(self) -> range:
        """The wanted rows of the segment that lie in this piece, counted from its first row."""
        wanted, stop = self.segment.wanted, self.first + self.count
        low, high = max(wanted.start, self.first), min(wanted.stop, stop)
        return range(low - self.first, max(low, high) - self.first)


def is_prompt(pieces: Sequence[Piece]) -> bool:
    """Whether the pass takes the path for prompts: more AR rows than the fused products are for."""
    return pieces[0].segment.view is View.AR and pieces[0].count > MAX_ROWS


def cut(segments: Sequence[Segment], prompt_rows: int, pass_rows: int) -> list[list[Piece]]:
    """Passes in order: of up to `prompt_rows` AR rows alone, or of up to `pass_rows` mixed rows.

    A block is never cut, because its rows see one another; it joins the last pass if it fits. The
    rows that it sees are in the cache by then in either case. A block of which nothing is wanted
    leaves no trace and does not run.
    """
    passes: list[list[Piece]] = []
    for index, segment in enumerate(segments):
        rows = len(segment)
        if segment.view is View.AR:
            passes += [
                [Piece(index, segment, first, min(prompt_rows, rows - first))]
                for first in range(0, rows, prompt_rows)
            ]
        elif segment.wanted:
            held = sum(piece.count for piece in passes[-1]) if passes else pass_rows
            if held + rows > pass_rows or is_prompt(passes[-1]):
                passes.append([])
            passes[-1].append(Piece(index, segment, 0, rows))
    return passes


def segment_table(pieces: Sequence[Piece], length: int) -> NDArray[np.int32]:
    """The device's table of a pass (`orthrus_kernels.elementwise.rows`): i32 [pieces, SEGMENT_SIZE].

    length: rows that the cache holds, which the positions count from.
    """
    table = np.zeros((len(pieces), SEGMENT_SIZE), np.int32)
    row = 0
    for entry, piece in zip(table, pieces, strict=True):
        start = piece.segment.start + piece.first
        entry[:] = _VIEWS[piece.segment.view], row, piece.count, start - length, -1
        row += piece.count
    return table


def pass_tokens(pieces: Sequence[Piece]) -> NDArray[np.int32]:
    """Tokens of all rows of a pass."""
    parts = [piece.segment.tokens[piece.first : piece.first + piece.count] for piece in pieces]
    return np.array([token for part in parts for token in part], np.int32)


def wanted_rows(pieces: Sequence[Piece]) -> list[int]:
    """Rows of a pass whose logits are wanted, in order."""
    rows: list[int] = []
    first = 0
    for piece in pieces:
        rows += [first + row for row in piece.wanted]
        first += piece.count
    return rows
