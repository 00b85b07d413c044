"""How the segments of one `forward` call are cut into passes. Pure bookkeeping, no ggml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orthrus_gguf.runtime.protocol import Segment, View


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


def cut(segments: Sequence[Segment], max_ar_rows: int, max_block_rows: int) -> list[list[Piece]]:
    """Passes of at most `max_ar_rows` AR rows and `max_block_rows` rows in blocks, in order.

    An AR segment may be cut anywhere, since its rows do not depend on their company; but not a
    tree, of whose rows later passes would find nothing in the cache. A block is never cut, because
    its rows see one another; blocks join the last pass while they fit. A block of which nothing is
    wanted leaves no trace and does not run.
    """
    passes: list[list[Piece]] = []
    block_rows = 0  # in the last pass
    for index, segment in enumerate(segments):
        rows = len(segment)
        if segment.parents is not None:
            passes.append([Piece(index, segment, 0, rows)])
        elif segment.view is View.AR:
            passes += [
                [Piece(index, segment, first, min(max_ar_rows, rows - first))]
                for first in range(0, rows, max_ar_rows)
            ]
        elif segment.wanted:
            if not passes or block_rows + rows > max_block_rows:
                passes.append([])
                block_rows = 0
            passes[-1].append(Piece(index, segment, 0, rows))
            block_rows += rows
    return passes
