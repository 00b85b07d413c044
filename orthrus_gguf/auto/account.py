"""What drafts cost beside plain decoding, by the same clock: so that they never lose much."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.auto.costs import median
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.records import dataclass

#: Time that drafts may lose against plain decoding: a share of all time, and at first as many
#: single-row passes.
LOSS_SHARE, LOSS_CREDIT = 0.015, 2.0

#: Weight of the newest cycle in what the host takes beside a pass, and in how much longer than
#: expected cycles with drafts take.
NEWEST_HOST, NEWEST_EXCESS = 0.1, 0.3

#: A cycle that took this many times what was expected was held up.
HELD_UP = 2.0

#: What is still recent of a cycle with drafts after another one.
RECENT = 0.95

#: What a draft that was not verified counts for after another one.
REMEMBERED = 0.9


@dataclass
class Account:
    """Seconds lost to drafts. What was lost lately is judged by what plain decoding takes by the
    newest estimate: the first one may be of a quieter machine, and a debt that was never made would
    forbid drafts for a long while. Nor is a debt for ever: where drafts would have won again, what
    they would have gained repays it (`Unverified`).
    """

    elapsed: float = 0.0
    host: float = 0.0
    excess: float = 1.0
    forgiven: float = 0.0
    _settled: float = 0.0
    _seconds: float = 0.0
    _tokens: float = 0.0
    _held_up: bool = True
    _missed: float = 0.0

    def add_plain(self, cycle: Cycle, in_passes: float) -> None:
        """Count a cycle of plain decoding, with nothing beside it."""
        self.host += NEWEST_HOST * (cycle.seconds - in_passes - self.host)
        self.elapsed += cycle.seconds

    def add(self, cycle: Cycle, expected: float, alone: float) -> None:
        """Count a cycle. expected: seconds of its passes; where it took far more, that is not
        charged if the one before took what was expected; else such passes are dear. alone: seconds
        of a single-row pass."""
        self.elapsed += cycle.seconds
        if len(cycle.passes) > 1 or cycle.drafts or cycle.guesses:
            most = HELD_UP * (expected + self.host)
            charged = cycle.seconds if self._held_up else min(cycle.seconds, most)
            self.forgiven += cycle.seconds - charged
            self._held_up = cycle.seconds > most
            ratio = cycle.seconds / (expected + self.host)
            self.excess += NEWEST_EXCESS * (max(ratio, 1.0) - self.excess)
            self._settled += (1 - RECENT) * self._lately(alone)
            self._seconds = RECENT * self._seconds + charged
            self._tokens = RECENT * self._tokens + len(cycle.tokens)

    def add_unverified(self, tokens: int, seconds: float, alone: float) -> None:
        """Count a draft that was not verified for want of credit: it would have brought so many
        tokens in so many seconds by what was expected. What such drafts would have gained repays a
        debt, down to what drafts may lose at first."""
        gained = tokens * (alone + self.host) - self.excess * seconds - self.host
        self._missed = REMEMBERED * self._missed + gained
        debt = LOSS_CREDIT * alone - self.credit(alone)
        repaid = min(max(self._missed, 0.0), max(debt, 0.0))
        self._settled -= repaid
        self.forgiven += repaid
        self._missed -= repaid

    def credit(self, alone: float) -> float:
        """Seconds that drafts may yet lose."""
        lost = self._settled + self._lately(alone)
        return LOSS_CREDIT * alone + LOSS_SHARE * self.elapsed - lost

    def _lately(self, alone: float) -> float:
        return self._seconds - self._tokens * (alone + self.host)


@dataclass
class Unverified:
    """A draft that was not verified: the text that comes tells what it would have brought.

    position: of the anchor now. seconds: that verifying would have taken.
    """

    position: int
    tokens: Sequence[int]
    seconds: float
    _reached: int = 0

    def brought(self, cycle: Cycle) -> int | None:
        """The tokens that it would have brought, once they are told; 0 if they never will be."""
        if cycle.start != self.position:
            return 0
        self.position += len(cycle.tokens)
        for token in cycle.tokens:
            self._reached += 1
            if self._reached > len(self.tokens) or token != self.tokens[self._reached - 1]:
                return self._reached
        return None


class PlainCycles:
    """Cycles of plain decoding that are only counted, and learned from together."""

    def __init__(self, due: int) -> None:
        """due: cycles after which to learn."""
        self.count, self.due = 0, due
        self._seconds: list[float] = []

    def add(self, seconds: float | None) -> None:
        """Count one. seconds: of its pass; None of one in company, which says nothing here."""
        self.count += 1
        if seconds is not None:
            self._seconds.append(seconds)

    def taken(self, due: int) -> tuple[int, float]:
        """How many had a pass for themselves, and the median of its seconds; and start again."""
        alone = len(self._seconds)
        middle = median(self._seconds) if alone else 0.0
        self.count, self.due, self._seconds = 0, due, []
        return alone, middle
