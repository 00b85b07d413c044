"""The controller: what it decides on machines of all kinds, and its promise never to be slower."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from toy_model import BLOCK, VOCAB, ToyCache, ToyModel, greedy_continuation

from orthrus_gguf.auto.acceptance import Acceptance, sums
from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.decode import Plan, Policy, Strategy, decode, prefill
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.policy import Cycle, Pass
from orthrus_gguf.runtime.protocol import Logits, Segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

GREEDY = SamplingSettings(temperature=0)


class Machine:
    """Costs in closed form, and the clock that they drive."""

    def __init__(self, per_row: float, *, misjudged: float = 1.0) -> None:
        """per_row: cost of a row beyond the first, in single-row passes. misjudged: by what factor
        passes of several rows really take longer than the controller is told.
        """
        self.per_row, self.misjudged = per_row, misjudged
        self.now = 0.0

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return 1e-2 * (1 + self.per_row * (ar_rows + diffusion_rows - 1))

    def observe(self, done: Pass) -> None:
        pass

    def clock(self) -> float:
        return self.now


class MachineModel(ToyModel):
    def __init__(self, machine: Machine, drafter: Callable[..., list[int]], sure: float) -> None:
        super().__init__(drafter, sureness=sure)
        self.machine = machine

    def forward(self, segments: Sequence[Segment], cache: ToyCache) -> list[Logits]:
        rows = sum(map(len, segments))
        factor = self.machine.misjudged if rows > 1 else 1.0
        self.machine.now += factor * self.machine.seconds(rows, 0, 0)
        return super().forward(segments, cache)


def drafter(right: float, seed: int = 0) -> Callable[[Sequence[int], int], list[int]]:
    """Each draft token is right with this probability, by its position, once and for all."""

    def draft(prefix: Sequence[int], rows: int) -> list[int]:
        tokens = greedy_continuation(prefix, rows)
        return [
            t if random.Random(f"{seed} {len(prefix) + i}").random() < right else (t + 1) % VOCAB
            for i, t in enumerate(tokens)
        ]

    return draft


def rate(
    machine: Machine, policy: Plan | Policy, right: float, *, sure: float = 6.0, n: int = 300
) -> float:
    """Tokens per single-row pass of time."""
    model = MachineModel(machine, drafter(right), sure)
    cache, sampler = model.new_cache(10_000), Sampler(GREEDY)
    tokens = [1, 2, 3]
    tokens.append(sampler.sample(prefill(model, cache, tokens), tokens))
    machine.now = 0.0
    for _ in decode(model, cache, sampler, tokens, policy, n, clock=machine.clock):
        pass
    return n * 1e-2 / machine.now


@pytest.mark.parametrize("per_row", [0.0, 0.01, 0.05, 0.2, 0.6])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("sure", [2.0, 6.0])
def test_never_slower_than_plain_decoding(per_row: float, right: float, sure: float) -> None:
    machine = Machine(per_row)
    assert rate(machine, Controller(machine, BLOCK), right, sure=sure) >= 0.97


@pytest.mark.parametrize("misjudged", [2.0, 5.0])
def test_not_even_when_costs_are_misjudged(misjudged: float) -> None:
    machine = Machine(0.01, misjudged=misjudged)
    assert rate(machine, Controller(machine, BLOCK), 0.3) >= 0.96


@pytest.mark.parametrize("per_row", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("right", [0.5, 0.9])
def test_close_to_the_best_fixed_strategy(per_row: float, right: float) -> None:
    machine = Machine(per_row)
    fixed = [
        Plan(Strategy.AR, 0),
        *(Plan(Strategy.TWO_PASS, width) for width in (1, 3, 7)),
        *(Plan(Strategy.FUSED, width, blocks) for width in (3, 7) for blocks in (1, 3)),
    ]
    best = max(rate(machine, plan, right) for plan in fixed)
    assert rate(machine, Controller(machine, BLOCK), right) >= 0.9 * best


def test_dear_rows_mean_plain_decoding() -> None:
    machine = Machine(0.9)
    controller = Controller(machine, BLOCK)
    assert rate(machine, controller, 0.95) == pytest.approx(1.0)
    assert {phase.outlook.plan.strategy for phase in controller.phases} == {Strategy.AR}


def test_drafting_is_tried_again_when_the_text_changes() -> None:
    """A drafter that is wrong for 400 tokens, then right."""

    def turns(prefix: Sequence[int], rows: int) -> list[int]:
        return drafter(0.95 if len(prefix) > 400 else 0.0)(prefix, rows)

    machine = Machine(0.02)
    model = MachineModel(machine, turns, 6.0)
    cache, sampler = model.new_cache(10_000), Sampler(GREEDY)
    tokens = [1, 2]
    tokens.append(sampler.sample(prefill(model, cache, tokens), tokens))
    machine.now = 0.0
    before = after = 0.0
    policy = Controller(machine, BLOCK)
    for cycle in decode(model, cache, sampler, tokens, policy, 1000, clock=machine.clock):
        if cycle.start < 400:
            before = machine.now
        elif cycle.start > 700:
            after += sum(done.seconds for done in cycle.passes)
    assert 400 * 1e-2 / before >= 0.97
    assert 300 * 1e-2 / after > 2


def test_models_without_heads_look_up() -> None:
    machine = Machine(0.05)
    controller = Controller(machine, None)
    assert controller.choose([], 5, 10) == Draft(Source.BLOCK, (), ())
    offer = Draft(Source.LOOKUP, (1, 2, 3), (0.9, 0.9, 0.9))
    assert controller.choose([offer], 5, 10) is offer


def test_phases_account_for_everything() -> None:
    machine = Machine(0.02)
    controller = Controller(machine, BLOCK)
    rate(machine, controller, 0.8)
    assert sum(phase.tokens for phase in controller.phases) >= 300
    assert sum(phase.seconds for phase in controller.phases) == pytest.approx(machine.now)


def cycle(accepted: int, confidence: Sequence[float], source: Source = Source.BLOCK) -> Cycle:
    tokens = tuple(range(len(confidence)))
    draft = Draft(source, tokens, tuple(confidence))
    return Cycle(0, tokens, accepted, (*tokens[:accepted], 99), draft)


def test_acceptance_is_learned_per_confidence() -> None:
    """Tokens given 55 % are always accepted here, tokens given 35 % never."""
    acceptance = Acceptance(8)
    for _ in range(100):
        acceptance.observe(cycle(2, [0.55, 0.55, 0.35, 0.55]))
    high, low = acceptance.of_draft(Draft(Source.BLOCK, (1, 2), (0.55, 0.35)), 2)
    assert high > 0.95
    assert low < 0.1
    by_position = acceptance.of_source(Source.BLOCK, 4)
    assert by_position[0] > 0.9
    assert by_position[2] < 0.1
    assert by_position[3] == pytest.approx(0.7), "what was never reached is not known"


def test_sources_are_told_apart_and_forgotten() -> None:
    acceptance = Acceptance(8)
    for _ in range(100):
        acceptance.observe(cycle(0, [0.8], Source.TAIL))
    tail, block = (
        acceptance.of_draft(Draft(s, (1,), (0.8,)), 1)[0] for s in (Source.TAIL, Source.BLOCK)
    )
    assert tail < 0.2 < 0.8 < block
    for _ in range(2000):
        acceptance.relax(0.995)
    assert acceptance.of_draft(Draft(Source.TAIL, (1,), (0.8,)), 1)[0] == pytest.approx(
        block, rel=1e-2
    )


def test_sums() -> None:
    assert sums([0.5, 0.4]) == pytest.approx([0.0, 0.5, 0.7])
