"""What simulations say: arithmetic that can be done by hand, and the controller's promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.auto.costs import CostCurve, RunningCosts
from orthrus_gguf.bench.prediction.cards import CARDS
from orthrus_gguf.bench.prediction.passes import PredictedCurve
from orthrus_gguf.bench.simulation.acceptance_tables import TABLES
from orthrus_gguf.bench.simulation.hardware import (
    CHAIN_SHARE,
    DRAFTER_SHARE,
    CardCosts,
    CurveCosts,
    FlatCosts,
)
from orthrus_gguf.bench.simulation.recording import (
    COLUMNS,
    Origin,
    RecordedRows,
    Recording,
    Text,
)
from orthrus_gguf.bench.simulation.replay import (
    ReplayModel,
    ReplayNetwork,
    ReplayWithDrafter,
    VirtualClock,
)
from orthrus_gguf.bench.simulation.strategies import (
    CONTROL,
    Outcome,
    Simulator,
    default_strategies,
    replay,
    runs,
)
from orthrus_gguf.bench.simulation.synthetic import synthesize
from orthrus_gguf.bench.simulation.tables import (
    BESIDE_BEST,
    BESIDE_PLAIN,
    LABEL,
    Simulation,
    as_json,
    checks,
    markdown,
    verdict,
)
from orthrus_gguf.drafting.plan import parse
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.shapes import SHAPES

BLOCK = 4
BESIDE = Beside("dflash", 8, 7)
CURVE = PredictedCurve(CARDS["rtx-4090"], SHAPES["qwen3-8b"], "q4_k_m")


def recording(right: int, length: int = 41) -> Recording:
    """A text of distinct tokens; every block is right in its first `right` rows."""
    output = tuple(range(100, 100 + length))
    choices = np.full((length - 1, BLOCK, COLUMNS), 0.5, np.float32)
    for anchor in range(length - 1):
        for row in range(BLOCK):
            token = 101 + anchor + row
            choices[anchor, row, 0] = token if row < right else 7
            choices[anchor, row, 2] = 8
    text = Text("toy", (1, 2), output, {BLOCK: choices})
    return Recording(Origin("toy", True, "by hand"), BLOCK, (text,))


def simulate(costs: object, drafts: Recording, names: Sequence[str]) -> list[Outcome]:
    assert isinstance(costs, (FlatCosts, CurveCosts, CardCosts))
    return list(Simulator(drafts, costs).outcomes([parse(name) for name in names]))


def test_by_hand() -> None:
    """40 tokens after the first. Two passes a cycle: 3 accepted and 1 more are 20 passes. Fused:
    when all 3 are accepted, the fourth draft is the next anchor, and its block has ridden along.
    """
    plain, two_pass, fused = simulate(FlatCosts(), recording(4), ["two-pass", "fused@3x4"])
    assert [o.strategy for o in (plain, two_pass, fused)] == ["ar", "two-pass@3", "fused@3x4"]
    assert plain.tokens_per_second == pytest.approx(1000)
    assert two_pass.tokens_per_second == pytest.approx(40 / 20e-3)
    assert two_pass.statistics.tokens_per_cycle == pytest.approx(4)
    assert fused.statistics.cycles == 10
    assert fused.tokens_per_second == pytest.approx(40 / 11e-3)


def test_costs_are_those_of_the_curve() -> None:
    """Plain decoding adds up one row at each position; 512 tokens come before."""
    curve = CostCurve((1, 8), (1e-3, 2e-3), 0, (1e-6, 1e-6))
    (plain,) = simulate(CurveCosts(curve, 512), recording(0), ["ar"])
    assert plain.seconds == pytest.approx(sum(1e-3 + 1e-6 * (512 + 2 + i) for i in range(40)))


def test_predicted_costs() -> None:
    costs = CardCosts(CURVE, 512)
    assert costs.seconds(8, 16, 100) == pytest.approx(
        CURVE.milliseconds(8, 16, 612) / 1e3, rel=0.01
    )


def test_the_controller_keeps_its_promises() -> None:
    """Made-up drafts of every domain, on a card beside plans that are good there, and on a machine
    whose rows are dear. Regressions of the controller show here."""
    drafts = synthesize("qwen3-8b", TABLES["qwen3-8b"], 1)
    drafts = replace(drafts, texts=drafts.texts[::2])
    names = ["two-pass@31", "fused@7x4", "fused@31x1", "auto"]
    dear = CostCurve((1, 2, 4, 8, 32), (1e-2, 1.6e-2, 2.8e-2, 5e-2, 18e-2), 0, (0.0, 0.0))
    on_card = checks(Simulation("x", "y", simulate(CardCosts(CURVE, 512), drafts, names), []))
    assert min(check.beside_plain for check in on_card) > 1.2
    assert sum(check.beside_best for check in on_card) / len(on_card) >= BESIDE_BEST
    where_dear = checks(Simulation("x", "y", simulate(CurveCosts(dear, 0), drafts, ["auto"]), []))
    assert min(check.beside_plain for check in where_dear) >= BESIDE_PLAIN


def beside_each_other(heads: Callable[[int], float], network: Callable[[int], float]) -> Recording:
    """A text of 1600 tokens that both draft: right that often at a position."""
    rng, length = np.random.default_rng(0), 1600
    output = rng.integers(100, 90_000, length)

    def drafted(rows: int, right: Callable[[int], float]) -> RecordedRows:
        choices = np.full((length - 1, rows, COLUMNS), 7, np.float32)
        for anchor, row in np.ndindex(length - 1, rows):
            at = anchor + 1 + row
            choices[anchor, row, 1::2] = right(at) ** 2, 0.01
            if at < length and rng.random() < right(at):
                choices[anchor, row, 0] = output[at]
        return choices

    blocks = {16: drafted(16, heads)}
    text = Text("toy", (1, 2), tuple(output.tolist()), blocks, drafted(7, network))
    return Recording(Origin("toy", False, "by hand"), 16, (text,), 8)


@pytest.mark.parametrize("first", ["heads", "network"])
def test_auto_drafts_with_whichever_promises_most(first: str) -> None:
    """Heads and a drafter's network beside each other: the one that is right by now, although the
    other was for long."""
    costs = CostCurve((1, 16, 128), (1e-3, 1.05e-3, 1.5e-3), 0, (0.0, 0.0), 8, 1e-3, 1.1e-3)
    costs = replace(costs, drafter=3e-4)

    def early(at: int) -> float:
        return 0.9 if at < 800 else 0.2

    def late(at: int) -> float:
        return 0.2 if at < 800 else 0.9

    drafts = beside_each_other(*((early, late) if first == "heads" else (late, early)))
    clock = VirtualClock()
    stock = ReplayModel(CurveCosts(costs, 0), clock, 16)
    model = ReplayWithDrafter(stock, ReplayNetwork(stock, CurveCosts(costs, 0), clock, BESIDE))
    policy = Controller(RunningCosts(costs), 16)
    used = {"heads": [0, 0], "network": [0, 0]}
    for cycle in replay(model, clock, drafts.texts[0], policy):
        which = "network" if cycle.draft.source.name == "dflash" else "heads"
        if cycle.drafts and cycle.draft.source.name != "tail":
            used[which][cycle.start >= 800] += len(cycle.tokens)
    second = "network" if first == "heads" else "heads"
    assert used[first][0] > 20 * used[second][0]
    assert used[second][1] > 2 * used[first][1]
    assert sum(map(sum, used.values())) > 800
    # Half of the text is left to either: both together are faster than the heads alone.
    found = simulate(CurveCosts(costs, 0), drafts, ["auto+no-dflash"])
    (alone,) = (each for each in found if each.strategy == "auto+no-dflash")
    assert clock.now < 0.75 * alone.seconds


def outcome(strategy: str, seconds: float) -> Outcome:
    (found,) = simulate(FlatCosts(), recording(0), ["ar"])
    return Outcome("toy", strategy, strategy == "auto", found.statistics, seconds)


def test_reports_say_what_they_are() -> None:
    outcomes = [outcome("ar", 1.0), outcome("two-pass@3", 0.5), outcome("auto", 0.6)]
    simulation = Simulation("a card", "some drafts", outcomes, ["It rests on this."])
    (check,) = checks(simulation)
    assert check.beside_plain == pytest.approx(1 / 0.6)
    assert check.best.strategy == "two-pass@3"
    assert check.beside_best == pytest.approx(0.5 / 0.6)
    line = verdict([check])
    assert "1.67x of plain decoding (toy; promised 0.97x: kept)" in line
    assert "0.83x of the best fixed strategy on average (promised 0.95x: BROKEN)" in line
    text = markdown([simulation])
    assert text.startswith(f"**{LABEL}**\n")
    assert "- It rests on this." in text
    data = as_json([simulation])
    assert data["label"] == LABEL
    assert [o["strategy"] for o in data["simulations"][0]["outcomes"]] == [
        "ar",
        "two-pass@3",
        "auto",
    ]


def test_the_default_compares_everything() -> None:
    names = [spelling.text for spelling in default_strategies(32, lookup=True)]
    assert len(names) == len(set(names))
    assert {"two-pass@7", "two-pass@31", "fused@31x4", "fused@7x1", "auto", "ar+lookup"} <= {*names}
    assert "two-pass@31+tree=16" in names
    of_drafter = [plan.text for plan in default_strategies(None, BESIDE, lookup=True)]
    assert {"two-pass@7+tree=16", "two-pass@7+lookup", "auto+no-lookup", "auto"} <= {*of_drafter}
    both = [plan.text for plan in default_strategies(32, BESIDE, lookup=True)]
    more = {"two-pass@7+dflash", "two-pass@7+dflash+tree=16", "auto+no-dflash"}
    assert {*names} | more < {*both}
    assert len(both) == len(set(both))


def test_the_control_stands_beside_controllers() -> None:
    """A naive bandit: it learns which plan is best, but tries all of them, and knows no more."""
    drafts = recording(4, 2001)
    outcomes = simulate(FlatCosts(), drafts, ["fused@3x4", "auto"])
    assert [o.strategy for o in outcomes] == ["ar", "fused@3x4", "auto", CONTROL]
    assert len(outcomes) == runs([parse("fused@3x4"), parse("auto")])
    plain, best, auto, control = (o.tokens_per_second for o in outcomes)
    assert plain < 0.5 * best < control < min(best, auto)
    assert [o.decided for o in outcomes] == [False, False, True, True]
    assert CONTROL not in [o.strategy for o in simulate(FlatCosts(), drafts, ["fused@3x4"])]
    assert runs([parse("fused@3x4")]) == 2


#: Of those, what is no other kind of draft than the first ones.
MORE = ("dflash-qwen3.5-27b", "mtp-27b-of-3", "mtp-qwen3.5-9b", "mtp-qwen3.5-4b")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in MORE))
        for name, table in TABLES.items()
        if table.network
    ],
)
def test_drafters_beside_stock_models(name: str) -> None:
    """Published acceptance is met, in every domain; a draft pass takes its share of a plain one."""
    table = TABLES[name]
    made = synthesize(name, table, 0)
    assert made.beside is not None
    most, costs = made.beside.most, CardCosts(CURVE, 512, made.beside)
    plans = [f"two-pass@{most}", f"two-pass@{most}+tree=16", "auto"]
    outcomes = simulate(costs, made, plans)
    assert {outcome.strategy for outcome in outcomes} == {"ar", *plans, CONTROL}
    by = {(o.domain, o.strategy): o for o in outcomes}
    for domain, published in table.tokens_per_cycle.items():
        plain, chain, tree, auto = (by[domain, plan] for plan in ("ar", *plans))
        assert chain.statistics.tokens_per_cycle == pytest.approx(published, rel=0.03)
        assert {source.name for source, *_ in auto.statistics.sources} >= {made.beside.name}
        assert tree.statistics.cycles < chain.statistics.cycles
        cycles = chain.statistics.cycles
        verify = costs.seconds(1 + most, 0, 256)
        assert chain.seconds / cycles == pytest.approx(costs.drafter + verify, rel=0.03)
        alone = plain.seconds / plain.statistics.cycles
        share = CHAIN_SHARE * most if table.chain else DRAFTER_SHARE
        assert costs.drafter == pytest.approx(share * alone, rel=0.05)
        assert auto.tokens_per_second > 0.93 * tree.tokens_per_second
