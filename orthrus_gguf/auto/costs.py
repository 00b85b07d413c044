"""What a pass costs: t(rows, context) of one model on one machine with one set of settings."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.records import dataclass

#: Weight of the newest pass in the running correction; and what the curve counts for beside the
#: first passes, in passes.
NEWEST, CURVE_COUNTS = 0.05, 8

#: Passes of a kind are learned from by the median of so many: some are held up, by another program
#: or a page fault, and a plan must not change with these.
TOGETHER = 8

#: The curve no longer fits when its corrections for small and for large passes differ by this
#: factor. A common factor (the machine is busy, the context has grown) changes no decision.
MISFIT = 1.4


class Costs(Protocol):
    """Seconds of a pass, for the controller."""

    @property
    def drafter(self) -> float:
        """Of a block of a drafter's own network; 0 where that is not known."""
        ...

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float: ...

    def observe(self, done: Pass, times: int = 1) -> None:
        """Learn from a pass, the median of so many."""
        ...


class SharedCosts:
    """Costs for one of several sequences that share their passes, and do alike.

    A pass then has the rows of all of them: what is best for one at that price is best for all.
    """

    def __init__(self, costs: Costs, sequences: Callable[[], int]) -> None:
        """sequences: how many share a pass now."""
        self._costs, self._sequences = costs, sequences

    @property
    def drafter(self) -> float:
        return self._costs.drafter * max(self._sequences(), 1)

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        count = max(self._sequences(), 1)
        return self._costs.seconds(count * ar_rows, count * diffusion_rows, context)

    def observe(self, done: Pass, times: int = 1) -> None:
        self._costs.observe(done, times)


@dataclass(frozen=True)
class CostCurve:
    """Measured passes, straight lines between them.

    rows, seconds: AR passes at context `context`, rows ascending. draft: seconds of a pass of
    `draft_rows` diffusion rows there; mixed: of one with `draft_rows` rows of both views each.
    per_token: seconds that each token of context adds, in a pass of the fewest and of the most
    rows of `rows`. threads: of the CPU, which were the fastest; 0 where nothing was to be chosen.
    drafter: of a block of a drafter's own network, 0 without one.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    context: int
    per_token: tuple[float, float]
    draft_rows: int = 0
    draft: float = 0.0
    mixed: float = 0.0
    threads: int = 0
    drafter: float = 0.0

    def at(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        """Seconds of a pass."""
        rows = ar_rows + diffusion_rows
        seconds = self._line(rows) * self._factor(ar_rows, diffusion_rows)
        low, high = self.per_token
        first, last = self.rows[0], self.rows[-1]
        share = (rows - first) / (last - first) if last > first else 0.0
        slope = max(low + (high - low) * share, 0.0)
        return max(seconds + slope * (context - self.context), 0.1 * seconds)

    def _line(self, rows: int) -> float:
        """Interpolated; beyond the last point no row is free, however flat the curve was before."""
        proportional = self.seconds[-1] * rows / self.rows[-1]
        if len(self.rows) == 1:
            return proportional
        i = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        r0, r1, s0, s1 = self.rows[i - 1], self.rows[i], self.seconds[i - 1], self.seconds[i]
        line = s0 + (s1 - s0) * (rows - r0) / (r1 - r0)
        return line if rows <= self.rows[-1] else max(line, proportional)

    def _factor(self, ar_rows: int, diffusion_rows: int) -> float:
        """What diffusion rows cost beside as many AR rows."""
        if not diffusion_rows or not self.draft_rows:
            return 1.0
        if not ar_rows:
            return self.draft / self._line(self.draft_rows)
        return self.mixed / self._line(2 * self.draft_rows)


class RunningCosts:
    """A cost curve, corrected by the passes that really run."""

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        self._scales = [1.0, 1.0]  # of passes of one row, of more
        self._counts = [0, 0]
        self._waiting: list[list[float]] = [[], []]  # what passes took, of what was expected

    @property
    def drafter(self) -> float:
        return self._scales[True] * self.curve.drafter

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        large = ar_rows + diffusion_rows > 1
        return self._scales[large] * self.curve.at(ar_rows, diffusion_rows, context)

    def observe(self, done: Pass, times: int = 1) -> None:
        """Move the correction of passes of one row, or of more, towards what such passes took.

        As long as none of the other kind has run, a machine that is slower or faster is the likely
        reason, and both move.
        """
        ar_rows = done.ar_rows + done.company
        expected = self.curve.at(ar_rows, done.diffusion_rows, done.context)
        ratio = done.seconds / expected if expected > 0 else 1.0
        large = ar_rows + done.diffusion_rows > 1
        if times == 1:
            waiting = self._waiting[large]
            waiting.append(ratio)
            if len(waiting) < TOGETHER:
                return
            ratio, times = median(waiting), len(waiting)
            waiting.clear()
        self._counts[large] += times
        weight = max(1 - (1 - NEWEST) ** times, times / (CURVE_COUNTS + self._counts[large]))
        self._scales[large] += weight * (ratio - self._scales[large])
        if not self._counts[not large]:
            self._scales[not large] = self._scales[large]

    @property
    def fits(self) -> bool:
        """Whether the curve still has the right shape. Only known once both kinds have run."""
        if min(self._counts) < 1 / NEWEST:
            return True
        return max(self._scales) < MISFIT * min(self._scales)


def median(values: Sequence[float]) -> float:
    """The upper one of two in the middle."""
    return sorted(values)[len(values) // 2]
