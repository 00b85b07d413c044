"""A replayed recording against the model itself: the same cycles, pass for pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from drafters import drafter_file, loaded_pair

from orthrus_gguf.auto.calibration import measure
from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.auto.costs import CostCurve, Costs, RunningCosts
from orthrus_gguf.bench.simulation.hardware import FLAT, CurveCosts, FlatCosts
from orthrus_gguf.bench.simulation.record import record_text
from orthrus_gguf.bench.simulation.recording import Text
from orthrus_gguf.bench.simulation.replay import (
    ReplayModel,
    ReplayNetwork,
    ReplayWithDrafter,
    VirtualClock,
)
from orthrus_gguf.bench.simulation.strategies import replay
from orthrus_gguf.decode import decode, drive, prefill, run_cycle
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, Plan, Strategy, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.load import RuntimeName
from orthrus_gguf.runtime.protocol import OWN_VIEWS, Choices, Model, Segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

N_NEW = 40
BLOCK = 16
GREEDY = SamplingSettings(temperature=0)

#: Golden prompts: drafts are refused in one all the time, in the other now and then.
CASES = (7, 8)

PLANS = [
    Plan(Strategy.AR),
    Plan(Strategy.TWO_PASS, 15),
    Plan(Strategy.TWO_PASS, 4, cut=0.05),
    Plan(Strategy.TWO_PASS, 15, also=("lookup",), tail=True),
    Plan(Strategy.TWO_PASS, 6, tree=12),
    Plan(Strategy.FUSED, 15, 4),
    Plan(Strategy.FUSED, 7, 2, tail=True),
    Plan(Strategy.FUSED, 3, 1, also=("lookup",)),
]


@pytest.fixture(scope="module")
def model(demo_file: Callable[..., Path]) -> Iterator[Model]:
    with ModelFile.open(demo_file("f32")) as file:
        model = GgmlModel.load(file, threads=1)
        yield model
        model.close()


def run(model: Model, prompt: list[int], plan: Plan) -> tuple[list[int], list[Cycle]]:
    """Tokens and cycles of the real thing."""
    # A cache with little room cuts trees, which a replay does not know of.
    cache = model.new_cache(1024)
    sequence = TokenSequence(model.config, cache, Sampler(GREEDY), list(prompt))
    drive(model, prefill(sequence))
    cycles = list(decode(model, sequence, FixedPolicy(plan, model.config), N_NEW - 1))
    return sequence.tokens, cycles


@pytest.fixture(scope="module")
def texts(model: Model, golden: dict[str, Any]) -> list[Text]:
    """With blocks of every size, so that a replay has nothing to approximate."""
    found = []
    for case in CASES:
        prompt = golden["cases"][case]["prompt_ids"]
        tokens, _ = run(model, prompt, Plan(Strategy.AR))
        output, sizes = tokens[len(prompt) :], range(2, BLOCK + 1)
        found.append(record_text(model, Sampler(GREEDY), "golden", prompt, output, sizes))
    return found


def replayed(text: Text, plan: Plan, clock: VirtualClock) -> list[Cycle]:
    """Cycles of the replay."""
    model = ReplayModel(FlatCosts(), clock, BLOCK)
    return list(replay(model, clock, text, FixedPolicy(plan, model.config)))


def passes(cycles: list[Cycle]) -> list[list[tuple[int, int, int]]]:
    return [[(p.ar_rows, p.diffusion_rows, p.context) for p in c.passes] for c in cycles]


def guesses(cycles: list[Cycle]) -> list[list[tuple[Any, ...]]]:
    return [[(g.guess, g.accepted, g.anchor, g.rows) for g in c.guesses] for c in cycles]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.strategy.value}-{plan.width}")
def test_replays_are_exact(model: Model, texts: list[Text], plan: Plan) -> None:
    for text in texts:
        tokens, real = run(model, list(text.prompt), plan)
        assert tuple(tokens) == text.tokens
        clock = VirtualClock()
        again = replayed(text, plan, clock)
        assert [c.start for c in again] == [c.start for c in real]
        assert [c.drafts for c in again] == [c.drafts for c in real]
        assert [c.draft.source for c in again] == [c.draft.source for c in real]
        assert [c.accepted for c in again] == [c.accepted for c in real]
        assert [c.tokens for c in again] == [c.tokens for c in real]
        assert passes(again) == passes(real)
        assert guesses(again) == guesses(real)
        assert clock.now == pytest.approx(FLAT * sum(len(c.passes) for c in real))


class Timed:
    """The model itself, on the clock of a simulation."""

    def __init__(self, model: Model, costs: Costs, clock: VirtualClock) -> None:
        self.config, self.new_cache = model.config, model.new_cache
        self._model, self._costs, self._clock = model, costs, clock

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        ar, diffusion = (sum(len(s) for s in segments if s.view is view) for view in OWN_VIEWS)
        self._clock.now += self._costs.seconds(ar, diffusion, segments[0].cache.length)
        return self._model.forward(segments)


@pytest.mark.parametrize("blocks", ["cheap", "dear"])
def test_the_controller_decides_alike(model: Model, texts: list[Text], blocks: str) -> None:
    """Trees included: on the same clock, the same cycles for the same reasons."""
    mixed = 1e-3 if blocks == "cheap" else 1e-2  # seconds of a pass of both views
    curve = CostCurve((1, 128), (1e-3, 1.01e-3), 0, (0.0, 0.0), 8, 1e-3, mixed)
    costs = CurveCosts(curve, 0)
    trees = carried = 0
    for text in texts:
        clock, again_clock = VirtualClock(), VirtualClock()
        timed: Any = Timed(model, costs, clock)
        sequence = TokenSequence(model.config, model.new_cache(1024), Sampler(GREEDY), [])
        sequence.tokens += text.prompt
        drive(timed, prefill(sequence))
        real = list(decode(timed, sequence, controller(costs), N_NEW - 1, clock=clock))
        assert tuple(sequence.tokens) == text.tokens
        replayed = ReplayModel(costs, again_clock, BLOCK)
        again = list(replay(replayed, again_clock, text, controller(costs)))
        assert passes(again) == passes(real)
        assert guesses(again) == guesses(real)
        assert [c.tokens for c in again] == [c.tokens for c in real]
        assert [c.draft.source for c in again] == [c.draft.source for c in real]
        trees += sum(len(c.drafts) + 1 < c.passes[-1].ar_rows for c in again)
        carried += sum(len(c.guesses) for c in again)
    assert trees >= 3
    assert (carried > 10) == (blocks == "cheap")


def controller(costs: Costs) -> Controller:
    """Without lookups, which win on so short a text."""
    clock = VirtualClock()
    measured = measure(ReplayModel(costs, clock, BLOCK), clock=clock)
    return Controller(RunningCosts(measured), BLOCK, without=["lookup"])


def test_cycles_are_those_of_the_official_implementation(
    texts: list[Text], golden: dict[str, Any]
) -> None:
    """The golden cycle starts, as far as room is not yet short: their texts are longer."""
    for case, text in zip(CASES, texts, strict=True):
        cycles = replayed(text, Plan(Strategy.TWO_PASS, BLOCK - 1), VirtualClock())
        starts = [c.start for c in cycles]
        expected = golden["cases"][case]["cycle_starts"]
        full = [start for start in starts if start + BLOCK < len(text.tokens)]
        assert len(full) > 5
        assert full == expected[: len(full)]


# --- a drafter's network beside it ---


@pytest.fixture(scope="module")
def pair(demo_file: Callable[..., Path]) -> Iterator[ModelWithDrafter]:
    with loaded_pair(demo_file("f32"), drafter_file(), RuntimeName.CPU) as found:
        yield found


def test_what_its_network_drafts_is_replayed_exactly(
    pair: ModelWithDrafter, golden: dict[str, Any]
) -> None:
    """Recorded backwards, after the whole text was told; drafted forwards, as the text grows. With
    heads and lookups beside it, in chains and trees."""
    prompt = golden["cases"][CASES[1]]["prompt_ids"]
    plain, _ = run_beside(pair, prompt, "ar")
    output = plain[len(prompt) :]
    text = record_text(pair, Sampler(GREEDY), "golden", prompt, output, range(2, 10))
    assert text.drafter is not None
    assert text.drafter.shape == (len(output) - 1, 7, 4)
    drafted = 0
    for spelt in ("ar+dflash", "two-pass@3+dflash+lookup", "two-pass@7+dflash+tree=12", "fused@7"):
        tokens, real = run_beside(pair, prompt, spelt)
        assert tuple(tokens) == text.tokens
        clock = VirtualClock()
        stock = ReplayModel(FlatCosts(), clock, BLOCK)
        model = ReplayWithDrafter(
            stock, ReplayNetwork(stock, FlatCosts(), clock, Beside("dflash", 8, 7))
        )
        policy = FixedPolicy(parse(spelt), model.config)
        again = list(replay(model, clock, text, policy))
        assert [(c.drafts, c.draft.source, c.tokens) for c in again] == [
            (c.drafts, c.draft.source, c.tokens) for c in real
        ]
        assert passes(again) == passes(real)
        drafted += sum(c.accepted for c in real if c.draft.source.name == "dflash")
    assert drafted > 20


def run_beside(pair: ModelWithDrafter, prompt: list[int], spelt: str) -> tuple[list[int], Any]:
    cache, beside = pair.new_cache(1024), pair.new_draft_cache(1024)
    sampler = Sampler(GREEDY)
    sequence = TokenSequence(pair.config, cache, sampler, list(prompt), draft_cache=beside)
    policy = FixedPolicy(parse(spelt), pair.config)
    drafters = policy.drafters(sequence)
    drive(pair, prefill(sequence, drafters))
    found = []
    while (most := len(prompt) + N_NEW - len(sequence.tokens)) > 0:
        found.append(drive(pair, run_cycle(sequence, policy, drafters, most))[0])
    return sequence.tokens, found


def test_narrow_blocks_are_parts_of_wider_ones(texts: list[Text]) -> None:
    text = texts[0]
    coarse = Text(text.domain, text.prompt, text.output, {BLOCK: text.blocks[BLOCK]})
    cycle, *_ = replayed(coarse, Plan(Strategy.TWO_PASS, 3), VirtualClock())
    assert list(cycle.draft.tokens) == text.blocks[BLOCK][0, :4, 0].tolist()
