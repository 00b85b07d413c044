"""Measures what passes cost on this machine, and remembers it on disk."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from orthrus_gguf import __version__
from orthrus_gguf.auto.costs import CostCurve, RunningCosts
from orthrus_gguf.auto.remembered import cache_folder, curve_path, read_curve, write_curve
from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.protocol import (
    Draw,
    Model,
    Segment,
    Threaded,
    ar_segment,
    diffusion_segment,
)
from orthrus_gguf.sampling import Sampler, SamplingSettings
from orthrus_gguf.this_machine import machine

#: Rows of the passes that are timed, as far as time allows.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

#: Passes of at most so many rows are timed first: those that drafts are verified in.
FEW = 16

#: Context of the curve, and the longer one that tells what context costs.
NEAR, FAR = 64, 1088

#: Rows of each view in the draft pass and the mixed pass.
VIEW_ROWS = 8

#: Seconds that measuring may take, or so many passes of one row where they take longer. Passes
#: that would not fit are not run.
BUDGET, BUDGET_PASSES = 0.8, 40

#: Other numbers of threads are used only if they take this share of the time or less.
WORTH_CHANGING = 0.95

#: A run that takes less than this part of the best one before it shows that those warmed up.
WARMED_UP = 0.7

Clock = Callable[[], float]


def measure(model: Model, *, budget: float = BUDGET, clock: Clock = time.perf_counter) -> CostCurve:
    """Time passes of this model, a few hundred milliseconds in all, or those of a few dozen tokens.

    Contents do not matter, so the cache is only declared to hold rows. A model that leaves its
    number of threads open is left with the fastest.
    """
    timer = _Timer(model, clock)
    threads = fastest_threads(model, timer.seconds) if isinstance(model, Threaded) else 0
    single = timer.seconds(1, 0)
    timer.allow(max(budget, BUDGET_PASSES * single))
    points = {1: single}
    _add_points(points, timer, [rows for rows in ROWS[1:] if rows <= FEW], budget)
    if timer.affords(3 * single):  # the first passes of a process are seldom its fastest
        points[1] = min(single, timer.seconds(1, 0))
    for more, fewer in itertools.pairwise(sorted(points, reverse=True)):
        points[fewer] = min(points[fewer], points[more])  # what is held up takes longer, not less
    few = max(points)
    block, draft, mixed = min(VIEW_ROWS, model.config.block_size or 0), 0.0, 0.0
    near = CostCurve(tuple(points), tuple(points.values()), NEAR, (0.0, 0.0))
    if block and timer.affords(6 * near.at(block, 0, NEAR)):
        draft, mixed = timer.seconds(0, block), timer.seconds(block, block)
    else:
        block = 0
    drafter = timer.drafter_seconds(model) if isinstance(model, ModelWithDrafter) else 0.0
    # What context costs matters more than what very wide passes do.
    context = 4 * (points[1] + points[few])
    known = timer.affords(context)
    wide = [rows for rows in ROWS if rows > FEW]
    _add_points(points, timer, wide, budget, keep=context if known else 0.0)
    most, (low, high) = max(points), (0.0, 0.0)
    if known:
        low, high = timer.per_token({rows: points[rows] for rows in (1, few)}, most)
    if few > 1:  # rows attend one by one
        high = max(low + (high - low) * (most - 1) / (few - 1), 0.0)
    views = block, draft, mixed
    return CostCurve(
        tuple(points), tuple(points.values()), NEAR, (low, high), *views, threads, drafter
    )


def _add_points(
    points: dict[int, float],
    timer: _Timer,
    counts: Sequence[int],
    budget: float,
    *,
    keep: float = 0.0,
) -> None:
    """Time AR passes of more rows than before, as far as time allows. keep: seconds to leave."""
    for count in counts:
        # A pass costs at most what its rows cost one by one, and each is run twice. Slow ones are
        # worth fewer points: lines between them are as good.
        if points[1] > budget / 20 and count in (2, 4, 16):
            continue
        most = max(points)
        if not timer.affords(keep + 2 * points[most] * count / most) or not timer.fits(count):
            break
        points[count] = timer.seconds(count, 0)


def fastest_threads(model: Threaded, seconds: Callable[[int, int], float]) -> int:
    """Leave the model with the number of its threads whose passes are the fastest; that number, 0
    if there is nothing to choose.

    seconds: of a pass of so many rows of each view. Passes of one row and of several count alike.
    """
    if len(model.thread_counts) < 2:
        return 0

    def timed(count: int) -> float:
        model.use_threads(count)
        return seconds(1, 0) + seconds(VIEW_ROWS, 0)

    first, *others = model.thread_counts
    best, least = first, timed(first)
    for count in others:
        took = timed(count)
        if took < WORTH_CHANGING * least:
            best, least = count, took
        elif took > 1.25 * least:
            break  # fewer still are slower still
    # The machine may have been busy for a moment: the first has another chance.
    if best != first and timed(first) * WORTH_CHANGING <= least:
        best = first
    model.use_threads(best)
    return best


def restore_threads(model: Threaded, threads: int, seconds: Callable[[int, int], float]) -> bool:
    """Whether remembered threads are still the ones to use; the model then has them.

    Fewer than there are cores may have been best while something else ran: each time, the first of
    the numbers to choose from is tried beside them.
    """
    if threads not in model.thread_counts or threads == model.thread_counts[0]:
        return True
    first = seconds(1, 0)
    model.use_threads(threads)
    if seconds(1, 0) < first:
        return True
    model.use_threads(model.thread_counts[0])
    return False


class _Timer:
    """Runs passes on a scratch cache against a budget of time."""

    def __init__(self, model: Model, clock: Clock) -> None:
        self._model, self._clock, self._end = model, clock, 0.0
        self._capacity = min(FAR + ROWS[-1], model.config.n_ctx_train)
        self._cache = model.new_cache(self._capacity)
        self._near = min(NEAR, self._capacity // 2)
        self._move(self._near)

    def allow(self, seconds: float) -> None:
        """Start the budget."""
        self._end = self._clock() + seconds

    def affords(self, seconds: float) -> bool:
        return self._clock() + seconds < self._end

    def fits(self, rows: int) -> bool:
        return bool(self._cache.length + rows <= self._capacity)

    def seconds(self, ar_rows: int, diffusion_rows: int) -> float:
        """The fastest of two to five runs, as many as a twentieth of a second holds.

        First runs may compile kernels, second ones capture graphs. A run that beats all before it
        by far says so: another one follows, and what they took beyond the best is not charged.
        """
        return self._fastest(self._segments(ar_rows, diffusion_rows))

    def drafter_seconds(self, model: ModelWithDrafter) -> float:
        """The same, of a block of the drafter's network."""
        cache = model.new_draft_cache(self._capacity)
        cache.assume(self._near)
        sampler = Sampler(SamplingSettings(temperature=0))
        history = [0] * (self._near + 1)
        sequence = TokenSequence(model.config, self._cache, sampler, history, draft_cache=cache)
        return self._fastest([sequence.drafter_segment(cache.beside.most)])

    def _fastest(self, segments: list[Segment]) -> float:
        times: list[float] = []
        while (
            len(times) < 2
            or (len(times) < 5 and times[-1] < WARMED_UP * min(times[:-1]))
            or (len(times) < 5 and min(times) * len(times) < 0.05)
        ):
            before = self._clock()
            self._model.forward(segments)
            times.append(self._clock() - before)
        best = min(times)
        self._end += sum(times) - best * len(times)
        return best

    def per_token(self, near: dict[int, float], most: int) -> tuple[float, float]:
        """Seconds per token of context, in passes of the fewest and of the most rows of `near`
        (rows: seconds there). most: rows that have to fit."""
        far = min(FAR, self._capacity - most)
        if far <= 2 * self._near:
            return 0.0, 0.0
        self._move(far)
        slopes = [
            max((self.seconds(rows, 0) - time_near) / (far - self._near), 0.0)
            for rows, time_near in sorted(near.items())
        ]
        return slopes[0], slopes[-1]

    def _move(self, context: int) -> None:
        self._cache.assume(context - self._cache.length)

    def _segments(self, ar_rows: int, diffusion_rows: int) -> list[Segment]:
        cache, mask = self._cache, self._model.config.mask_token
        history = [0] * (cache.length + 1)
        sampler = Sampler(SamplingSettings(temperature=0))
        segments = []
        if ar_rows:
            draw = Draw(sampler, history)
            segments.append(ar_segment(cache, [0] * ar_rows, cache.length, draw=draw))
        if diffusion_rows and mask is not None:
            draw = Draw(sampler, history, detail=True)
            block = diffusion_segment(cache, 0, mask, diffusion_rows, cache.length, draw=draw)
            segments.append(block)
        return segments


class MachineCosts:
    """What passes of one model cost on this machine: `Costs` for the controller.

    The curve comes from disk when it is first needed; if it is not there, it is measured and put
    there. When it stops fitting the passes that run, what these took takes its place.
    """

    def __init__(
        self,
        model: Model,
        identity: str,
        say: Callable[[str], None],
        *,
        folder: Path | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """identity: tells model files apart. say: receives a line when a remembered curve is
        damaged or from elsewhere, and ignored; or cannot be written.
        """
        self._model, self._say, self._clock = model, say, clock
        self._key = {
            **machine(),
            "cores": str(os.cpu_count()),
            "runtime": model.description,
            "model": identity,
            "threads": "measured" if _open_threads(model) else "given",
            "version": __version__,
        }
        self._path = curve_path(folder or cache_folder(), self._key)
        self._looked = False
        self._corrected: RunningCosts | None = None

    @property
    def _running(self) -> RunningCosts:
        if not self.recall():
            self._corrected = RunningCosts(self._measure())
        assert self._corrected is not None
        return self._corrected

    def prepare(self) -> None:
        """Recall or measure now, not when it is first needed; say so if it takes a moment."""
        if not self.recall():
            self._say("measuring what passes cost on this machine (once)")
            self._corrected = RunningCosts(self._measure())

    def recall(self) -> bool:
        """Whether the costs are known without measuring. The model then has its threads."""
        if not self._looked:
            self._looked = True
            curve = self._recall()
            if curve is not None:
                self._corrected = RunningCosts(curve)
        return self._corrected is not None

    @property
    def curve(self) -> CostCurve:
        return self._running.curve

    @property
    def drafter(self) -> float:
        return self._running.drafter

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return self._running.seconds(ar_rows, diffusion_rows, context)

    def observe(self, done: Pass, times: int = 1) -> None:
        running = self._running
        running.observe(done, times)
        if not running.fits:
            self._corrected = RunningCosts(running.corrected())
            self._remember(self._corrected.curve)

    def _recall(self) -> CostCurve | None:
        try:
            curve = read_curve(self._path, self._key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._say(f"{self._path}: ignored, measuring again ({error})")
            return None
        if not isinstance(self._model, Threaded):
            return curve
        timer = _Timer(self._model, self._clock)
        return curve if restore_threads(self._model, curve.threads, timer.seconds) else None

    def _measure(self) -> CostCurve:
        curve = measure(self._model, clock=self._clock)
        self._remember(curve)
        return curve

    def _remember(self, curve: CostCurve) -> None:
        try:
            write_curve(self._path, self._key, curve)
        except OSError as error:
            self._say(f"{self._path}: costs of passes cannot be remembered: {error.strerror}")


def _open_threads(model: Model) -> bool:
    return isinstance(model, Threaded) and len(model.thread_counts) > 1
