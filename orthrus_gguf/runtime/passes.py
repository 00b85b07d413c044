"""What runtimes share: how the segments of one call are cut into passes, and paths of their rows.

Pure bookkeeping. What it decides about a sequence depends on nothing but that sequence's own
segments, except for which rows run together, and rows do not depend on their company.
"""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.protocol import Segment, View, path_to


@dataclass(frozen=True, eq=False)
class Piece:
    """`count` rows of a segment from its row `first` on, which run in one pass.

    index: of the segment in the call. offset: of a block, how many rows of blocks of its sequence
    lie before it, wherever those run (see `cut`).
    """

    index: int
    segment: Segment
    first: int
    count: int
    offset: int = 0

    @property
    def wanted(self) -> range:
        """The wanted rows of the segment that lie in this piece, counted from its first row."""
        wanted, stop = self.segment.wanted, self.first + self.count
        if self.count == len(self.segment.tokens):
            return wanted
        low, high = max(wanted.start, self.first), min(wanted.stop, stop)
        return range(low - self.first, max(low, high) - self.first)

    @property
    def start(self) -> int:
        """The position of its first row, unless it is a tree's."""
        return self.segment.start + self.first

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.segment.tokens[self.first : self.first + self.count]


@dataclass
class _Blocks:
    """The blocks of one sequence, while passes are cut: the earliest pass for the next one, the
    last pass that has one, and the rows that lie before it."""

    earliest: int = 0
    last: int = -1
    offset: int = 0


def cut(
    segments: Sequence[Segment], max_ar_rows: int, max_block_rows: int, alignment: int = 1
) -> list[list[Piece]]:
    """Passes of at most `max_ar_rows` AR rows and `max_block_rows` rows in blocks.

    In each, the AR rows come first, sequence by sequence, then the blocks, sequence by sequence.
    A chain may be cut anywhere, since its rows do not depend on their company; but not a tree, of
    whose rows later passes would find nothing in the cache: a larger one has a pass for itself.

    A block is never cut, because its rows see one another, and comes no earlier than the last AR
    rows of its sequence. Blocks of one sequence lie one behind the other, at their `offset`, a
    multiple of `alignment`; where they exceed `max_block_rows`, the next begins at 0 again, in a
    later pass than those before.
    A block that nothing is asked about leaves no trace and does not run.
    """
    if len(segments) == 1 and len(segments[0]) <= min(max_ar_rows, max_block_rows):
        segment = segments[0]
        asked = segment.view is View.AR or segment.wanted or segment.taps
        return [[Piece(0, segment, 0, len(segment))]] if asked else []
    passes, blocks = _cut_ar(segments, max_ar_rows)
    block_rows = [0] * len(passes)
    for index, segment in enumerate(segments):
        if segment.view is View.AR or not (segment.wanted or segment.taps):
            continue
        rows, own = len(segment), blocks[id(segment.cache)]
        if own.offset and own.offset + rows > max_block_rows:
            own.earliest, own.offset = own.last + 1, 0
        number = own.earliest
        while (
            number < len(passes)
            and block_rows[number]
            and (block_rows[number] + rows > max_block_rows)
        ):
            number += 1
        if number == len(passes):
            passes.append([])
            block_rows.append(0)
        passes[number].append(Piece(index, segment, 0, rows, own.offset))
        block_rows[number] += rows
        own.last = max(own.last, number)
        own.offset += -(-rows // alignment) * alignment
    order = {sequence: number for number, sequence in enumerate(blocks)}
    for pieces in passes:
        pieces.sort(
            key=lambda piece: (piece.segment.view is not View.AR, order[id(piece.segment.cache)])
        )
    return passes


def _cut_ar(
    segments: Sequence[Segment], max_rows: int
) -> tuple[list[list[Piece]], dict[int, _Blocks]]:
    """Passes of the AR segments; and, by the cache's id, where a sequence's blocks begin."""
    passes: list[list[Piece]] = []
    blocks: dict[int, _Blocks] = {}
    room = 0  # in the last pass
    for index, segment in enumerate(segments):
        own = blocks.setdefault(id(segment.cache), _Blocks())
        if segment.view is not View.AR:
            continue
        first, rows = 0, len(segment)
        while first < rows:
            left = rows - first
            if not room or (segment.parents is not None and room < left):
                passes.append([])
                room = max_rows
            count = left if segment.parents is not None else min(left, room)
            passes[-1].append(Piece(index, segment, first, count))
            first, room = first + count, max(room - count, 0)
        own.earliest = len(passes) - 1
    return passes, blocks


def wanted_rows(pieces: Sequence[Piece]) -> list[int]:
    """The wanted rows of a pass, counted over all its pieces."""
    rows: list[int] = []
    first = 0
    for piece in pieces:
        rows += [first + i for i in piece.wanted]
        first += piece.count
    return rows


def check_path(rows: Sequence[int], count: int, parents: Sequence[int] | None) -> None:
    """Raise ValueError unless `rows` are a path, from row 0 on, of `count` rows that are pending.

    parents: of a tree; None for a chain. No rows are a path too: nothing is kept.
    """
    if not rows:
        return
    if parents is None:
        if len(rows) > count or list(rows) != list(range(len(rows))):
            raise ValueError(f"rows {list(rows)} are not the first of {count} that are pending")
    elif not 0 <= rows[-1] < count or list(rows) != path_to(rows[-1], parents):
        raise ValueError(f"rows {list(rows)} are no path of the tree that is pending: {parents}")
