"""Draws choices on the host, for runtimes whose logits are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from orthrus_gguf.runtime.protocol import Draw, Logits, Segment, View
from orthrus_gguf.sampling import Choice


class Prefix(Sequence[int]):
    """The tokens before a position, of which a sampler reads few: nothing is copied until then."""

    def __init__(self, draw: Draw, start: int, rows: list[int]) -> None:
        """rows: tokens of the rows after the first one, which is at position `start`."""
        self._draw, self._first, self._rows = draw, start + 1, rows

    def __len__(self) -> int:
        return self._first + len(self._rows)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        first, ahead = self._first, self._draw.ahead
        known = first - len(ahead)
        if isinstance(index, slice) and index.step is None and index.stop is None:
            start = index.indices(len(self))[0]
            tail = [*ahead, *self._rows]
            return [*self._draw.history[start:known], *tail[max(start - known, 0) :]]
        return [*self._draw.history[:known], *ahead, *self._rows][index]


def draw_choices(segment: Segment, logits: Logits) -> tuple[Choice | None, ...]:
    """The choices of a segment's wanted rows, given their logits [len(wanted), n_vocab].

    Of an AR segment, the first wanted row is drawn, and then the row that follows it with the token
    drawn, and so on: what verification can ask about. The others stay None. In a block each row's
    prefix holds what the rows before it drew.
    """
    wanted = segment.wanted
    if not wanted:
        return ()
    draw = segment.draw
    if draw is None:
        raise ValueError("rows are wanted of a segment that does not say how to draw them")

    def choose(row: int, rows: list[int]) -> Choice | None:
        i = row - wanted.start
        return draw.sampler.draw(
            logits[i],
            Prefix(draw, segment.start, rows),
            detail=draw.detail,
            top=draw.top,
            allowed=None if draw.allowed is None else draw.allowed[i],
        )

    found: list[Choice | None] = [None] * len(wanted)
    if segment.view is not View.AR:
        drawn: list[int] = []
        for i in range(len(wanted)):
            choice = found[i] = choose(wanted.start + i, drawn)
            if choice is None:
                break
            drawn.append(choice.token)
        return tuple(found)
    rows = _rows_to(segment, wanted.start)
    row: int | None = wanted.start
    while row is not None and row in wanted:
        choice = found[row - wanted.start] = choose(row, rows)
        if choice is None:
            break
        rows.append(choice.token)
        row = _child(segment, row, choice.token)
    return tuple(found)


def _rows_to(segment: Segment, row: int) -> list[int]:
    """Tokens on the way from the first row, not included, to a row."""
    if segment.parents is None:
        return list(segment.tokens[1 : row + 1])
    path = []
    while row > 0:
        path.append(segment.tokens[row])
        row = segment.parents[row]
    return path[::-1]


def _child(segment: Segment, row: int, token: int) -> int | None:
    """The row that follows `row` with `token`."""
    tokens = segment.tokens
    if segment.parents is None:
        return row + 1 if row + 1 < len(tokens) and tokens[row + 1] == token else None
    for child in range(row + 1, len(tokens)):
        if segment.parents[child] == row and tokens[child] == token:
            return child
    return None
