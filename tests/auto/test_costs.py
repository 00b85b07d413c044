"""Cost curves: interpolation, correction by what runs, measuring, and remembering on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_model import ToyModel

from orthrus_gguf.auto.calibration import MachineCosts, measure
from orthrus_gguf.auto.costs import CostCurve, RunningCosts
from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.runtime.protocol import Choices, Segment

CURVE = CostCurve(
    rows=(1, 2, 8),
    seconds=(1.0, 1.2, 3.0),
    context=64,
    per_token=(0.001, 0.008),
    draft_rows=4,
    draft=2.0,
    mixed=3.6,
)


class TimedModel(ToyModel):
    """A model whose passes take as long as a function says, on a clock of its own."""

    def __init__(self, seconds: Callable[[int, int, int], float], **toy: Any) -> None:
        super().__init__(**toy)
        self.now = 0.0
        self._seconds = seconds

    def clock(self) -> float:
        return self.now

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        ar = sum(len(s) for s in segments if s.view.value == "ar")
        length = segments[0].cache.length
        self.now += self._seconds(ar, sum(map(len, segments)) - ar, length)
        return super().forward(segments)


def linear(ar_rows: int, diffusion_rows: int, context: int) -> float:
    return 0.004 + 0.001 * ar_rows + 0.002 * diffusion_rows + 1e-6 * context * ar_rows


def test_lines_between_points_and_beyond() -> None:
    at = [CURVE.at(rows, 0, 64) for rows in (1, 2, 5, 8)]
    assert at == pytest.approx([1.0, 1.2, 2.1, 3.0])
    assert CURVE.at(12, 0, 64) == pytest.approx(3.0 * 12 / 8), "unmeasured rows are never free"
    steep = CostCurve((1, 2, 4), (1.0, 1.0, 3.0), 64, (0.0, 0.0))
    assert steep.at(8, 0, 64) == pytest.approx(7.0), "nor cheaper than the last measured ones"


def test_context_costs_more_in_larger_passes() -> None:
    assert CURVE.at(1, 0, 164) == pytest.approx(1.1)
    assert CURVE.at(8, 0, 164) == pytest.approx(3.8)


def test_rows_of_the_other_view_cost_what_was_measured() -> None:
    assert CURVE.at(0, 4, 64) == pytest.approx(2.0)
    assert CURVE.at(4, 4, 64) == pytest.approx(3.6)
    assert CURVE.at(0, 8, 64) == pytest.approx(3.0 * 2.0 / 1.8)


def test_measuring_finds_the_curve() -> None:
    model = TimedModel(linear)
    curve = measure(model, clock=model.clock)
    assert model.now < 1.0, "a few hundred milliseconds"
    for rows in (1, 3, 16):
        assert curve.at(rows, 0, 64) == pytest.approx(linear(rows, 0, 64), rel=0.02)
    assert curve.at(0, 8, 64) == pytest.approx(linear(0, 8, 64), rel=0.02)
    assert curve.at(8, 8, 64) == pytest.approx(linear(8, 8, 64), rel=0.02)
    assert curve.at(1, 0, 120) == pytest.approx(linear(1, 0, 120), rel=0.02)


def test_what_context_costs_is_measured_before_very_wide_passes() -> None:
    """On small models those of 128 rows alone take a third of the time there is."""

    def steep(ar_rows: int, diffusion_rows: int, context: int) -> float:
        rows = ar_rows + diffusion_rows
        return 0.004 + 0.001 * rows + context * (1e-6 + 2e-6 * rows)

    model = TimedModel(steep)
    curve = measure(model, clock=model.clock)
    assert model.now < 1.0
    assert 32 in curve.rows
    for rows in (1, 8, 16, 32):
        assert curve.at(rows, 0, 500) == pytest.approx(steep(rows, 0, 500), rel=0.03)


@pytest.mark.parametrize("single", [0.05, 0.15, 0.3])
def test_measuring_keeps_to_its_time(single: float) -> None:
    model = TimedModel(lambda ar, diffusion, _: single * (ar + diffusion))
    curve = measure(model, clock=model.clock)
    assert model.now <= max(0.8, 40 * single) + 2 * single
    assert curve.at(16, 0, 64) == pytest.approx(16 * single, rel=0.01)


def test_slow_models_are_measured_too() -> None:
    """Rows that are nearly free are no less so where a pass takes a third of a second."""
    model = TimedModel(lambda ar, diffusion, _: 0.3 + 0.01 * (ar + diffusion))
    curve = measure(model, clock=model.clock)
    assert model.now < 40 * 0.31
    assert curve.at(8, 0, 64) == pytest.approx(0.38, rel=0.02)
    assert curve.at(16, 0, 64) == pytest.approx(0.46, rel=0.02)
    assert curve.at(0, 8, 64) == pytest.approx(0.38, rel=0.02)
    assert 32 in curve.rows


class ThreadedModel(TimedModel):
    """Passes of one row take no less from two threads on; the fourth thread has no core."""

    thread_counts = (4, 3, 2, 1)

    def __init__(self, by_threads: dict[int, float]) -> None:
        super().__init__(lambda ar, *_: by_threads[self.threads] * (1 + 0.1 * ar))
        self.threads = 4
        self.tried: list[int] = []

    def use_threads(self, count: int) -> None:
        self.threads = count
        self.tried.append(count)


@pytest.mark.parametrize(
    ("by_threads", "best"),
    [
        ({4: 0.010, 3: 0.010, 2: 0.011, 1: 0.02}, 4),
        ({4: 0.030, 3: 0.010, 2: 0.011, 1: 0.02}, 3),
        ({4: 0.030, 3: 0.020, 2: 0.012, 1: 0.01}, 1),
        ({4: 0.010, 3: 0.0098, 2: 0.02, 1: 0.04}, 4),
    ],
)
def test_the_fastest_number_of_threads_stays(by_threads: dict[int, float], best: int) -> None:
    model = ThreadedModel(by_threads)
    curve = measure(model, clock=model.clock)
    assert curve.threads == model.threads == best
    assert curve.seconds[0] == pytest.approx(1.1 * by_threads[best])


def test_a_busy_moment_does_not_cost_threads() -> None:
    model = ThreadedModel({4: 0.050, 3: 0.015, 2: 0.02, 1: 0.04})
    busy = model.use_threads

    def use_threads(count: int) -> None:
        if count == 4 and model.tried:
            model._seconds = lambda ar, *_: 0.010 * (1 + 0.1 * ar)  # the moment has passed
        busy(count)

    model.use_threads = use_threads  # type: ignore[method-assign]
    assert measure(model, clock=model.clock).threads == 4


def test_first_runs_that_compile_teach_nothing() -> None:
    """On a cold GPU: each shape compiles for seconds, then is captured, then costs next to nothing
    more than one row. The curve is that of the warm passes, at all row counts."""
    runs: Counter[tuple[int, int]] = Counter()

    def cold(ar_rows: int, diffusion_rows: int, context: int) -> float:
        runs[ar_rows, diffusion_rows] += 1
        first = {1: 4.0, 2: 0.03}.get(runs[ar_rows, diffusion_rows], 0.0)
        return first + 0.007 + 1e-5 * (ar_rows + diffusion_rows)

    model = TimedModel(cold)
    curve = measure(model, clock=model.clock)
    assert curve.rows == (1, 2, 4, 8, 16, 32, 64, 128)
    assert curve.seconds == pytest.approx([0.007 + 1e-5 * rows for rows in curve.rows])
    assert curve.draft_rows == 8
    assert curve.draft == pytest.approx(0.00708)
    assert curve.mixed == pytest.approx(0.00716)


def test_plain_models_have_no_draft_passes() -> None:
    model = TimedModel(linear, heads=False)
    assert measure(model, clock=model.clock).draft_rows == 0


def test_a_busy_machine_changes_all_costs_alike() -> None:
    costs = RunningCosts(CURVE)
    for _ in range(200):
        for rows in (1, 8):
            costs.observe(Pass(rows, 0, 64, 2 * CURVE.at(rows, 0, 64)))
    assert costs.seconds(1, 0, 64) == pytest.approx(2.0, rel=0.01)
    assert costs.seconds(8, 0, 64) == pytest.approx(6.0, rel=0.01)
    assert costs.fits


def test_a_slow_machine_is_slow_for_passes_that_have_not_run_yet() -> None:
    """Or plain decoding would seem faster than it is wherever drafts run first."""
    costs = RunningCosts(CURVE)
    for _ in range(100):
        costs.observe(Pass(8, 0, 64, 1.5 * CURVE.at(8, 0, 64)))
    assert costs.seconds(1, 0, 64) == pytest.approx(1.5, rel=0.01)
    assert costs.seconds(4, 4, 64) == pytest.approx(1.5 * 3.6, rel=0.01)
    costs.observe(Pass(1, 0, 64, 1.0), 100)
    assert costs.seconds(1, 0, 64) == pytest.approx(1.0, rel=0.01)
    assert costs.seconds(8, 0, 64) == pytest.approx(4.5, rel=0.01), "its own passes tell"


def test_each_point_of_a_curve_is_corrected_by_its_own_passes() -> None:
    """One point that was measured while something else ran says nothing of the others: rows that
    seem free are drafted for nothing."""
    really = CostCurve((1, 2, 4, 8, 16), (1.0, 1.2, 1.5, 2.1, 3.0), 64, (0.0, 0.0), 4, 1.6, 2.4)
    wrong = replace(really, seconds=(1.0, 1.2, 1.5, 4.2, 3.0), mixed=7.2)
    costs = RunningCosts(wrong)
    for i in range(300):
        for rows, block in ((1, 0), (2, 0), (3, 0), (8, 0), (4, 4)):
            held_up = 5.0 if i % 5 == 0 else 1.0
            costs.observe(Pass(rows, block, 64, held_up * really.at(rows, block, 64)))
    for rows, block in ((1, 0), (2, 0), (3, 0), (8, 0), (16, 0), (4, 4)):
        found, expected = costs.seconds(rows, block, 64), really.at(rows, block, 64)
        assert found == pytest.approx(expected, rel=0.01 if rows < 16 else 0.6)
    assert not costs.fits
    fresh = RunningCosts(costs.corrected())
    assert fresh.fits
    for rows, block in ((1, 0), (2, 0), (8, 0), (4, 4)):
        assert fresh.seconds(rows, block, 64) == pytest.approx(costs.seconds(rows, block, 64))


def test_a_machine_that_slows_down_for_a_while_changes_no_ratio() -> None:
    """Whichever passes it holds up: those of one row, or of several."""
    costs = RunningCosts(CURVE)
    for slow in (1, 2, 1, 3, 1, 2):
        for rows in (1, 8) * 4:
            costs.observe(Pass(rows, 0, 64, slow * CURVE.at(rows, 0, 64)))
        for held_up in (1, 8):
            for rows in (1, 8):
                for _ in range(30):
                    seconds = (slow if rows == held_up else 1) * CURVE.at(rows, 0, 64)
                    costs.observe(Pass(rows, 0, 64, seconds))
            ratio = costs.seconds(8, 0, 64) / costs.seconds(1, 0, 64)
            assert ratio == pytest.approx(3.0, rel=0.35)


def test_a_median_counts_as_often_as_its_passes() -> None:
    one_by_one, at_once = RunningCosts(CURVE), RunningCosts(CURVE)
    for _ in range(10):
        one_by_one.observe(Pass(1, 0, 64, 1.3))
    at_once.observe(Pass(1, 0, 64, 1.3), 10)
    assert at_once.seconds(1, 0, 64) == pytest.approx(one_by_one.seconds(1, 0, 64), rel=0.02)
    assert at_once.seconds(1, 0, 64) > 1.1, "the first few tell most"


def test_passes_that_were_held_up_change_nothing() -> None:
    costs = RunningCosts(CURVE)
    for i in range(100):
        costs.observe(Pass(1, 0, 64, 1000.0 if i % 3 == 0 else 1.0))
    assert costs.seconds(1, 0, 64) == pytest.approx(1.0)


def test_rows_of_other_sequences_are_part_of_what_a_pass_costs() -> None:
    """A row in company is no pass of a single row that was slow."""
    costs = RunningCosts(CURVE)
    for _ in range(200):
        costs.observe(Pass(1, 0, 64, CURVE.at(8, 0, 64), company=7))
        costs.observe(Pass(1, 0, 64, CURVE.at(1, 0, 64)))
    assert costs.seconds(1, 0, 64) == pytest.approx(1.0)
    assert costs.seconds(8, 0, 64) == pytest.approx(3.0)
    assert costs.fits


def test_another_shape_no_longer_fits() -> None:
    costs = RunningCosts(CURVE)
    for _ in range(60):
        costs.observe(Pass(1, 0, 64, 1.0))
        costs.observe(Pass(8, 0, 64, 6.0))
    assert not costs.fits


class TestRemembering:
    @pytest.fixture
    def timings(self) -> list[int]:
        return []

    @pytest.fixture
    def costs(self, tmp_path: Path, timings: list[int]) -> Callable[..., MachineCosts]:
        class Counting(ToyModel):
            def forward(self, segments: Sequence[Segment]) -> list[Choices]:
                timings.append(1)
                return super().forward(segments)

        def make(identity: str = "model", notes: list[str] | None = None) -> MachineCosts:
            said = notes if notes is not None else []
            return MachineCosts(Counting(), identity, said.append, folder=tmp_path / "costs")

        return make

    def test_measured_once(self, costs: Callable[..., MachineCosts], timings: list[int]) -> None:
        first = costs()
        assert not timings, "nothing is measured before it is needed"
        first.seconds(1, 0, 64)
        runs = len(timings)
        assert runs > 0
        assert costs().curve == first.curve
        assert len(timings) == runs
        costs("another model").seconds(1, 0, 64)
        assert len(timings) > runs

    def test_remembered_threads_serve_at_once(self, tmp_path: Path) -> None:
        said: list[str] = []

        def costs(model: ThreadedModel) -> MachineCosts:
            return MachineCosts(model, "model", said.append, folder=tmp_path, clock=model.clock)

        busy = {4: 0.03, 3: 0.01, 2: 0.02, 1: 0.04}
        first = ThreadedModel(busy)
        assert not costs(first).recall()
        costs(first).prepare()
        assert first.threads == 3
        again = ThreadedModel(busy)
        assert costs(again).recall()
        assert again.threads == 3
        given = ThreadedModel(busy)
        given.thread_counts = ()  # type: ignore[assignment]
        assert not costs(given).recall()
        quiet = ThreadedModel({4: 0.01, 3: 0.02, 2: 0.02, 1: 0.04})
        assert not costs(quiet).recall(), "all cores are free again"
        assert quiet.threads == 4
        costs(quiet).prepare()
        assert quiet.threads == 4
        assert said == ["measuring what passes cost on this machine (once)"] * 2

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: "[1, 2]",
            lambda text: text.replace('"model": "model"', '"model": "stranger"'),
            lambda text: json.dumps({**json.loads(text), "curve": {"rows": [1]}}),
            lambda text: _with(text, seconds=["fast"]),
            lambda text: _with(text, seconds=[float("nan")] * 7),
            lambda text: _with(text, rows=[3, 2, 1]),
            lambda text: _with(text, rows=[], seconds=[]),
            lambda text: _with(text, per_token=[0.0]),
            lambda text: _with(text, draft=-1.0),
            lambda text: _with(text, threads=1.5),
            lambda text: "\x00" * 100,
        ],
    )
    def test_damaged_or_foreign_files_are_ignored_with_a_note(
        self,
        costs: Callable[..., MachineCosts],
        tmp_path: Path,
        timings: list[int],
        damage: Callable[[str], str],
    ) -> None:
        costs().seconds(1, 0, 64)
        (path,) = (tmp_path / "costs").iterdir()
        path.write_text(damage(path.read_text()))
        runs = len(timings)
        notes: list[str] = []
        costs("model", notes).seconds(1, 0, 64)
        assert len(timings) > runs
        assert len(notes) == 1
        assert str(path) in notes[0]
        assert "ignored, measuring again" in notes[0]
        notes.clear()
        costs("model", notes).seconds(1, 0, 64)
        assert not notes, "the file has been repaired"

    def test_a_folder_that_cannot_be_written_is_noted(self, tmp_path: Path) -> None:
        (tmp_path / "costs").write_text("not a folder")
        notes: list[str] = []
        costs = MachineCosts(ToyModel(), "model", notes.append, folder=tmp_path / "costs")
        assert costs.seconds(1, 0, 64) > 0
        assert "cannot be remembered" in notes[-1]

    def test_passes_take_the_place_of_a_curve_that_stops_fitting(
        self, costs: Callable[..., MachineCosts], timings: list[int]
    ) -> None:
        made = costs()
        single, wide = made.seconds(1, 0, 64), made.seconds(8, 0, 64)
        runs = len(timings)
        for _ in range(60):
            made.observe(Pass(1, 0, 64, single))
            made.observe(Pass(8, 0, 64, 3 * wide))
        again = costs().curve
        assert again.at(8, 0, 64) / again.at(1, 0, 64) > 1.3 * wide / single
        ratio = made.seconds(8, 0, 64) / made.seconds(1, 0, 64)
        assert ratio == pytest.approx(3 * wide / single, rel=0.1)
        assert len(timings) == runs, "none was run for that"


def _with(text: str, **values: Any) -> str:
    data = json.loads(text)
    data["curve"].update(values)
    return json.dumps(data)
