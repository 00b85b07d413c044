"""What a pass costs: t(rows, context) of one model on one machine with one set of settings."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from typing import Protocol

from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.records import dataclass

#: Weight of the newest pass in a running correction; and what the curve counts for beside the
#: first passes, in passes.
NEWEST, CURVE_COUNTS = 0.05, 4

#: Passes are learned from by the median of so many: some are held up, by another program or a page
#: fault, and a plan must not change with these.
TOGETHER = 5

#: Few passes change a correction by no more than what they would if they took this many times more
#: or less: the machine may have slowed down between them and those that they are compared with.
AT_ONCE = 1.5

#: What the machine does now is the median of so many passes of any kind; a kind is compared with
#: the others among so many, if there are so few at least.
NOW, BESIDE, LEAST_BESIDE = 9, 8, 3

#: The curve no longer fits when its corrections differ by this factor, each of so many passes. (A
#: common factor changes no decision: the machine is busy, the context has grown.)
MISFIT, SURE = 1.4, 20


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


@dataclass
class _Correction:
    """What passes of one kind took, of what the curve says, beside others at about that time."""

    scale: float = 1.0
    count: int = 0
    waiting: list[float] = field(default_factory=list)

    def add(self, ratio: float, times: int) -> None:
        """Count a pass, or the median of several at once."""
        if times == 1:
            self.waiting.append(ratio)
            if len(self.waiting) < TOGETHER:
                return
            ratio, times = median(self.waiting), len(self.waiting)
            self.waiting.clear()
        self.count += times
        ratio = min(max(ratio, self.scale / AT_ONCE), AT_ONCE * self.scale)
        weight = max(1 - (1 - NEWEST) ** times, times / (CURVE_COUNTS + self.count))
        self.scale += weight * (ratio - self.scale)


class RunningCosts:
    """A cost curve, corrected by the passes that really run: all of it by how fast the machine is
    now, and each of its points by how it does beside the others."""

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        self._points = [_Correction() for _ in curve.rows]
        self._draft, self._mixed = _Correction(), _Correction()
        # Between two points, passes count for the nearer one by their ratio.
        self._borders = [(a * b) ** 0.5 for a, b in itertools.pairwise(curve.rows)]
        self._recent: deque[tuple[_Correction, float]] = deque(maxlen=NOW)
        self._machine = 1.0

    @property
    def drafter(self) -> float:
        return self._machine * self.curve.drafter

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        curve = self.curve.at(ar_rows, diffusion_rows, context)
        return self._machine * self._scale(ar_rows, diffusion_rows) * curve

    def _scale(self, ar_rows: int, diffusion_rows: int) -> float:
        """Between the corrections of the nearest points."""
        rows = ar_rows + diffusion_rows
        if diffusion_rows:
            own = self._mixed if ar_rows else self._draft
            if own.count:
                return own.scale
        known, points = self.curve.rows, self._points
        i = bisect_left(known, rows)
        if i in (0, len(known)):
            return points[min(i, len(known) - 1)].scale
        share = (rows - known[i - 1]) / (known[i] - known[i - 1])
        return points[i - 1].scale + share * (points[i].scale - points[i - 1].scale)

    def observe(self, done: Pass, times: int = 1) -> None:
        """Move the corrections towards what this pass took."""
        ar_rows = done.ar_rows + done.company
        expected = self.curve.at(ar_rows, done.diffusion_rows, done.context)
        if expected <= 0:
            return
        if done.diffusion_rows:
            kind = self._mixed if ar_rows else self._draft
        else:
            kind = self._points[bisect_left(self._borders, ar_rows)]
        ratio = done.seconds / expected
        beside = list(self._recent)[-BESIDE:]
        others = [found for other, found in beside if other is not kind]
        if len(others) >= LEAST_BESIDE:
            kind.add(ratio / median(others), times)
        self._recent.append((kind, ratio / kind.scale))
        self._machine = median([found for _, found in self._recent])

    @property
    def fits(self) -> bool:
        """Whether the curve still has the right shape, as far as passes have shown."""
        kinds = [*self._points, self._draft, self._mixed]
        sure = [kind.scale for kind in kinds if kind.count >= SURE]
        return not sure or max(sure) < MISFIT * min(sure)

    def corrected(self) -> CostCurve:
        """The curve of what really ran."""
        curve, block = self.curve, self.curve.draft_rows
        return replace(
            curve,
            seconds=tuple(
                self._machine * self._scale(rows, 0) * seconds
                for rows, seconds in zip(curve.rows, curve.seconds, strict=True)
            ),
            draft=self._machine * self._scale(0, block) * curve.draft,
            mixed=self._machine * self._scale(block, block) * curve.mixed,
            drafter=self.drafter,
        )


def median(values: Sequence[float]) -> float:
    """The upper one of two in the middle."""
    return sorted(values)[len(values) // 2]
