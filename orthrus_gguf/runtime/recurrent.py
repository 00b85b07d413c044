"""What runtimes keep account of where the state of recurrent layers lags behind the text.

What a row does to the state is kept beside it, in a record, and the state stays as it was: rows
that are accepted become part of it at the beginning of the next pass, with the same instructions,
and dropping the others costs nothing. This is the bookkeeping; kernels and memory are elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.model.hybrid import CONV_KERNEL
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.checkpoints import Checkpoints
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import Checkpoint, path_to

#: Rows that the convolution looks back on.
BACK = CONV_KERNEL - 1

Ints = NDArray[np.int32]
S = TypeVar("S")


def record_count(pending: int) -> int:
    """Records of a sequence with up to so many pending rows: of the rows accepted last and of the
    pending ones, and rows to look back on that are neither."""
    return 2 * pending + BACK


@dataclass(frozen=True)
class RunPlan:
    """What recurrent layers do with the rows of a piece, counted in the order of the pass.

    apply: records that become part of the committed state before anything else. records: where each
    row leaves what it does to the state; -1: nowhere. back: [rows, BACK], the rows before each, the
    nearest first: rows of the piece, or -1 - a record. replays: rows that do not follow the one
    before them, but begin from the committed state and these records.
    advance: the state behind the last row is kept, apart from the committed one, and there are no
    records to tell its rows apart by. begins: it is the first piece to do so. reach: rows that are
    pending then. ahead: it begins from such a state.
    """

    apply: Sequence[int]
    records: Ints
    back: Ints
    replays: Mapping[int, Sequence[int]]
    advance: bool = False
    begins: bool = False
    reach: int = 0
    ahead: bool = False


class Records:
    """Which records of a sequence hold what.

    Of up to `pending` rows of a segment, any may be dropped. Longer chains, which are prompts,
    advance the state at once: all of their rows are committed, or none.

    window: of the last committed rows, the newest last. accepted: of committed rows that the state
    lacks. ahead: the window of a state that has pending rows; else None.
    """

    def __init__(self, pending: int) -> None:
        self.pending = pending
        self.ahead: list[int] | None = None
        self._rows: list[int] = []  # of the pending rows
        self._reach = 0  # how many pending rows a state ahead has
        self.begin()

    def begin(self) -> None:
        """Stand behind a state whose window lies in the first records."""
        self.window, self.accepted = list(range(BACK)), list[int]()
        self.drop()

    def plan(self, piece: Piece, order: Sequence[int] | None = None) -> RunPlan:
        """What to do with a piece of an AR segment. order: rows of a tree in the order of the pass;
        default: as they are. It must be told when the pass has run (`ran`)."""
        segment, count = piece.segment, piece.count
        advance = segment.parents is None and len(segment) > self.pending
        window = self.window if self.ahead is None else self.ahead
        before = [*window, *self._rows][-BACK:]
        kept = min(count, BACK) if advance else count
        used = {*self.window, *window, *self.accepted, *self._rows}
        new = [slot for slot in range(record_count(self.pending)) if slot not in used][:kept]
        records = np.full(count, -1, np.int32)
        records[count - kept :] = new
        replays: dict[int, Sequence[int]] = {}
        if segment.parents is None:
            back = _look_back(count, before)
            if self._rows:
                replays[0] = list(self._rows)
        else:
            order = range(count) if order is None else order
            records = records[list(order)]  # of the segment's rows, in the order of the pass
            back = _branches(before, segment.parents, order, new, replays)
        begins, ahead = advance and piece.first == 0, self.ahead is not None
        reach = piece.first + count
        return RunPlan(list(self.accepted), records, back, replays, advance, begins, reach, ahead)

    def plan_block(self, start: int, length: int, count: int, shared: RunPlan | None) -> RunPlan:
        """What to do with `count` rows of a block behind the first `start`, of which `length` are
        committed: it begins from the state of those, which it leaves as it is: what it applies is
        for its own rows.

        shared: of AR rows of this sequence in the same pass, which run before the block does.
        Raises ValueError where the state before `start` is not at hand.
        """
        pending, ahead, rows, reach = start - length, self.ahead, self._rows, self._reach
        if shared is not None and shared.advance:
            ahead, reach = self._window_behind(shared), shared.reach
        elif shared is not None:
            rows = [*rows, *shared.records.tolist()]
        if ahead is None:
            known, replayed = 0 <= pending <= len(rows), rows[: max(pending, 0)]
            window = [*self.window, *replayed][-BACK:]
        else:
            known, replayed, window = pending == reach, [], ahead
        if not known:
            raise ValueError(f"no state at {start}: {length} rows are committed")
        apply, none = [] if shared else list(self.accepted), np.full(count, -1, np.int32)
        back, begins_ahead = _look_back(count, window), ahead is not None
        return RunPlan(apply, none, back, {0: replayed}, ahead=begins_ahead)

    def _window_behind(self, plan: RunPlan) -> list[int]:
        """Of a state that a plan advances."""
        before = self.window if self.ahead is None else self.ahead
        return [*before, *(int(slot) for slot in plan.records if slot >= 0)][-BACK:]

    def ran(self, plan: RunPlan, order: Sequence[int] | None = None) -> None:
        """The pass that was planned has run."""
        self.accepted = []
        if plan.advance:
            before = self.window if self.ahead is None else self.ahead
            self.ahead = [*before, *(int(slot) for slot in plan.records if slot >= 0)][-BACK:]
        else:
            in_order = plan.records if order is None else plan.records[np.argsort(order)]
            self._rows += in_order.tolist()

    def drop(self) -> None:
        """Forget the pending rows."""
        self._rows, self.ahead = [], None

    def commit(self, rows: Sequence[int], pending: int) -> bool:
        """Keep some of the pending rows, and drop the others. pending: how many there are. Whether
        the state that has them is the committed one now. ValueError where it cannot keep some."""
        self.check(rows, pending)
        kept = self.ahead if rows else None
        if kept is not None:
            self.window = kept
        elif self.ahead is None:
            self.accepted = [self._rows[row] for row in rows]
            self.window = [*self.window, *self.accepted][-BACK:]
        self.drop()
        return kept is not None

    def check(self, rows: Sequence[int], pending: int) -> None:
        """Raise ValueError for some of many rows."""
        if self.ahead is not None and 0 < len(rows) < pending:
            raise ValueError(
                f"{len(rows)} of {pending} rows: of more than {self.pending} a recurrent state"
                " keeps all or none"
            )


def _look_back(count: int, before: Sequence[int]) -> Ints:
    """The rows before each row of a chain (`RunPlan.back`)."""
    at = np.arange(count)[:, None] - np.arange(1, BACK + 1)
    records = -1 - np.array(before, np.int32)
    return np.where(at >= 0, at, records[np.minimum(BACK + at, BACK - 1)]).astype(np.int32)


def _branches(
    before: Sequence[int],
    parents: Sequence[int],
    order: Sequence[int],
    records: Sequence[int],
    replays: dict[int, Sequence[int]],
) -> Ints:
    """What lies before each row of a tree, in the order of the pass; and where one does not follow
    the row before it."""
    place = {row: at for at, row in enumerate(order)}
    back = np.empty((len(order), BACK), np.int32)
    for at, row in enumerate(order):
        parent = parents[row]
        path = path_to(parent, parents) if parent >= 0 else []
        way = [*(-1 - record for record in before), *(place[i] for i in path)]
        back[at] = way[: -BACK - 1 : -1]
        if place.get(parent, -1) != at - 1:
            replays[at] = [records[i] for i in path]
    return back


class Returning(ABC, Generic[S]):
    """The part of a cache whose states cannot be turned back: it goes back to those that it kept.

    Comes before what keeps keys and values among the bases of a cache.
    """

    _kept: Checkpoints[S]
    _length: int

    @abstractmethod
    def _keep(self) -> None:
        """Keep the state of where the cache stands."""

    @abstractmethod
    def _set(self, state: S | None) -> None:
        """Take over a state; None: of a text that has not begun."""

    @abstractmethod
    def drop(self) -> None:
        """Forget what is pending."""

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        """See `Cache.checkpoint`. Without `length`, the state is kept to come back to."""
        if length is None:
            self._keep()
            return Checkpoint(self._length)
        if not 0 <= length <= self._length:
            raise ValueError(f"no place to come back to: {length} of {self._length} rows held")
        return self._kept.reach(Checkpoint(length), self._length)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Cache.restore`."""
        length = checkpoint.length
        self._kept.check(length, self._length)
        self.drop()
        if length < self._length:
            self._set(self._kept.get(length))
        self._kept.forget_behind(length)
        self._length = length
