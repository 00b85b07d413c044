"""The controller: what it decides on machines of all kinds, and its promise never to be slower."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import BLOCK, VOCAB, ToyModel, greedy_continuation

from orthrus_gguf.auto.acceptance import BEHIND_SECOND, Acceptance, sums
from orthrus_gguf.auto.account import LOSS_CREDIT, LOSS_SHARE
from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.auto.costs import CostCurve, RunningCosts
from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.block import BLOCK as FROM_BLOCK
from orthrus_gguf.drafting.cycle import Cycle, Pass
from orthrus_gguf.drafting.draft import NO_DRAFT, Draft, Source
from orthrus_gguf.drafting.lookup import LOOKUP
from orthrus_gguf.drafting.plan import FixedPolicy, Strategy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.tail import TAIL
from orthrus_gguf.runtime.protocol import Choices, Logits, Segment, View
from orthrus_gguf.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0)


class Machine:
    """Costs in closed form, and the clock that they drive."""

    drafter = 0.0

    def __init__(self, per_row: float, *, misjudged: float = 1.0) -> None:
        """per_row: cost of a row beyond the first, in single-row passes. misjudged: by what factor
        passes of several rows really take longer than the controller is told.
        """
        self.per_row, self.misjudged = per_row, misjudged
        self.now = 0.0

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return 1e-2 * (1 + self.per_row * (ar_rows + diffusion_rows - 1))

    def observe(self, done: Pass, times: int = 1) -> None:
        pass

    def clock(self) -> float:
        return self.now


class MachineModel(ToyModel):
    def __init__(self, machine: Machine, drafter: Callable[..., list[int]], sure: float) -> None:
        super().__init__(drafter, sureness=sure)
        self.machine = machine

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        rows = sum(map(len, segments))
        factor = self.machine.misjudged if rows > 1 else 1.0
        self.machine.now += factor * self.machine.seconds(rows, 0, 0)
        return super().forward(segments)


def drafter(right: float, seed: int = 0) -> Callable[[Sequence[int], int], list[int]]:
    """Each draft token is right with this probability, by its position, once and for all."""

    def draft(prefix: Sequence[int], rows: int) -> list[int]:
        tokens = greedy_continuation(prefix, rows)
        return [
            t if random.Random(f"{seed} {len(prefix) + i}").random() < right else (t + 1) % VOCAB
            for i, t in enumerate(tokens)
        ]

    return draft


def cycles_of(model: MachineModel, policy: Policy | str, n: int) -> list[Cycle]:
    """The cycles of `n` tokens behind a prompt, on the machine's clock."""
    machine, sequence = model.machine, model.sequence([1, 2, 3], GREEDY)
    if isinstance(policy, str):
        policy = FixedPolicy(parse(policy), model.config)
    drive(model, prefill(sequence))
    machine.now = 0.0
    return list(decode(model, sequence, policy, n, clock=machine.clock))


def rate(
    machine: Machine, policy: Policy | str, right: float, *, sure: float = 6.0, n: int = 300
) -> float:
    """Tokens per single-row pass of time."""
    cycles_of(MachineModel(machine, drafter(right), sure), policy, n)
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


class BusyMachine(Machine):
    """All passes take longer than they did when they were measured, and some are held up."""

    def __init__(self, per_row: float, slower: float, held_up: int) -> None:
        """held_up: each how manieth pass takes four times as long."""
        super().__init__(per_row)
        rows = (1, 64)
        curve = CostCurve(rows, tuple(self.really(n) for n in rows), 0, (0.0, 0.0))
        self.costs, self.slower, self.held_up, self.passes = RunningCosts(curve), slower, held_up, 0

    def really(self, rows: int) -> float:
        return super().seconds(rows, 0, 0)

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        """Of a pass that runs now."""
        self.passes += 1
        held_up = 4.0 if self.passes % self.held_up == 0 else 1.0
        return held_up * self.slower * self.really(ar_rows)


@pytest.mark.parametrize("per_row", [0.05, 0.1])
@pytest.mark.parametrize("held_up", [7, 1000])
def test_drafts_pay_as_much_on_a_busy_machine(per_row: float, held_up: int) -> None:
    """Were its slowness charged to drafts, they would be forbidden for most of a short text."""
    quiet = Machine(per_row)
    expected = rate(quiet, Controller(quiet, BLOCK), 0.7)
    busy = BusyMachine(per_row, 1.5, held_up)
    found = rate(busy, Controller(busy.costs, BLOCK), 0.7) * 1.5 * (1 + 3 / held_up)
    assert found >= 0.85 * expected > 1.15


@pytest.mark.parametrize("per_row", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("right", [0.5, 0.9])
def test_close_to_the_best_fixed_strategy(per_row: float, right: float) -> None:
    machine = Machine(per_row)
    fixed = [
        "ar",
        *(f"two-pass@{width}" for width in (1, 3, 7)),
        *(f"fused@{width}x{blocks}" for width in (3, 7) for blocks in (1, 3)),
    ]
    best = max(rate(machine, plan, right) for plan in fixed)
    assert rate(machine, Controller(machine, BLOCK), right) >= 0.9 * best


def test_dear_rows_mean_plain_decoding() -> None:
    machine = Machine(0.9)
    controller = Controller(machine, BLOCK)
    assert rate(machine, controller, 0.95) == pytest.approx(1.0)
    assert {phase.prospect.plan.strategy for phase in controller.phases} == {Strategy.AR}


def test_drafting_is_tried_again_when_the_text_changes() -> None:
    """A drafter that is wrong for 400 tokens, then right."""

    def turns(prefix: Sequence[int], rows: int) -> list[int]:
        return drafter(0.95 if len(prefix) > 400 else 0.0)(prefix, rows)

    machine = Machine(0.02)
    model = MachineModel(machine, turns, 6.0)
    before = after = 0.0
    for cycle in cycles_of(model, Controller(machine, BLOCK), 1000):
        seconds = sum(done.seconds for done in cycle.passes)
        if cycle.start < 400:
            before += seconds
        elif cycle.start > 700:
            after += seconds
    assert 400 * 1e-2 / before >= 0.97
    assert 300 * 1e-2 / after > 2


class TwoChoices(MachineModel):
    """A drafter of two choices per token: the first is right with one probability, and if it is
    not, the second with another, by position, once and for all. It is always as sure."""

    def __init__(self, machine: Machine, first: float, second: float) -> None:
        super().__init__(machine, greedy_continuation, 0)
        self.first, self.second = first, second
        self.trees: list[int] = []

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        if any(segment.parents is not None for segment in segments):
            self.trees.append(len(segments[0]))
        return super().forward(segments)

    def _segment(self, segment: Segment) -> Logits:
        if segment.view is View.AR:
            return super()._segment(segment)
        cache: Any = segment.cache
        held = [*cache.tokens, *(cache.pending.tokens if cache.pending else ())]
        prefix, rows = [*held[: segment.start], segment.tokens[0]], []
        for i, right in enumerate(greedy_continuation(prefix, len(segment))):
            luck = random.Random(len(prefix) + i)
            if luck.random() < self.first:
                choices = right, (right + 1) % VOCAB
            elif luck.random() < self.second:
                choices = (right + 1) % VOCAB, right
            else:
                choices = (right + 1) % VOCAB, (right + 2) % VOCAB
            row = np.full(VOCAB, np.log(0.2 / (VOCAB - 2)), np.float32)
            row[list(choices)] = np.log([0.5, 0.3])
            rows.append(row)
        return np.stack(rows)[list(segment.wanted)]


@pytest.mark.parametrize(("first", "least"), [(0.5, 1.3), (0.7, 1.08)])
@pytest.mark.parametrize("per_row", [0.0, 0.01])
def test_trees_where_second_choices_are_often_right(
    first: float, least: float, per_row: float
) -> None:
    """They bring so much more than first choices alone, in tokens per cycle and per second; and
    a third more than the best fixed chain."""
    chances = {}
    for second in (0.0, 0.8):
        model = TwoChoices(Machine(per_row), first, second)
        cycles = cycles_of(model, Controller(model.machine, BLOCK), 400)
        chances[second] = 400 / len(cycles), 4.0 / model.machine.now, len(model.trees)
        if second:
            widest = max(cycle.passes[-1].ar_rows - 1 - len(cycle.drafts) for cycle in cycles)
            assert widest > 0, "rows that are not of the path"
            assert len(model.trees) > len(cycles) / 4
    chains = []
    for plan in ("two-pass@3", "two-pass@7", "fused@3x1", "fused@7x3"):
        model = TwoChoices(Machine(per_row), first, 0.8)
        cycles_of(model, plan, 400)
        chains.append(4.0 / model.machine.now)
    assert chances[0.8][0] >= least * chances[0.0][0]
    assert chances[0.8][1] >= least * chances[0.0][1]
    assert chances[0.8][1] >= 1.3 * max(chains)


@pytest.mark.parametrize("first", [0.5, 0.7])
@pytest.mark.parametrize("per_row", [0.01, 0.05])
def test_no_trees_where_second_choices_are_useless(first: float, per_row: float) -> None:
    """Though the drafter promises as much of them: a few of each source of drafts, to learn it."""
    model = TwoChoices(Machine(per_row), first, 0.0)
    controller = Controller(model.machine, BLOCK)
    cycles_of(model, controller, 200)
    assert len(model.trees) <= 12
    model.trees.clear()
    cycles_of(model, controller, 300)
    assert len(model.trees) <= 1


def test_no_trees_where_rows_are_dear() -> None:
    model = TwoChoices(Machine(0.5), 0.7, 0.8)
    cycles_of(model, Controller(model.machine, BLOCK), 200)
    assert not model.trees


def test_second_choices_are_learned_beside_what_the_drafter_promises() -> None:
    """0.8 of the rest is promised. Whether the tree held them does not matter."""
    acceptance = Acceptance(8)
    draft = Draft(FROM_BLOCK, (1, 2, 3), (0.5,) * 3, ((11, 0.4), (12, 0.4), (13, 0.4)))
    assert acceptance.seconds_of_draft(draft, 2) == pytest.approx([0.8, 0.8])
    assert acceptance.seconds_of_draft(draft, 9) == pytest.approx([0.8] * 3)
    for i in range(300):
        second = 12 if i % 4 == 0 else 99
        acceptance.observe(Cycle(0, draft.tokens, 1, (1, second), draft))
    assert acceptance.seconds_of_draft(draft, 3) == pytest.approx([0.25] * 3, abs=0.05)
    for _ in range(300):
        acceptance.observe(Cycle(0, (1, 12, 3), 3, (1, 12, 3, 9), draft))
    assert acceptance.seconds_of_draft(draft, 1) == pytest.approx([1.0], abs=0.05)
    assert acceptance.seconds_of_draft(Draft(LOOKUP, (1, 2), (0.5,) * 2), 2) == [0.0, 0.0]


def test_what_a_tree_cannot_tell_is_not_counted() -> None:
    """A tree that left a first choice out, which was right: nobody knows of the one behind it."""
    acceptance = Acceptance(8)
    draft = Draft(FROM_BLOCK, (1, 2, 3), (0.95, 0.55, 0.15), ((11, 0.0), (12, 0.4), (13, 0.4)))
    before = acceptance.of_draft(draft, 3)
    passes = (Pass(0, 4, 0, 1.0), Pass(3, 0, 0, 1.0))
    for _ in range(100):
        acceptance.observe(Cycle(0, (1, 12, 3), 1, (1, 2), draft, passes))
    after = acceptance.of_draft(draft, 3)
    assert after[0] > before[0]
    assert after[1] > before[1]
    assert after[2] == before[2]
    assert acceptance.of_source(FROM_BLOCK, 3)[1] > 0.95
    assert acceptance.of_source(FROM_BLOCK, 3)[2] < 0.95
    assert acceptance.seconds_of_draft(draft, 3)[2] == pytest.approx(0.4 / 0.85)


def test_what_stands_behind_second_choices_is_learned() -> None:
    """Beside what the same tokens promise behind first choices; only a second choice that was
    accepted has anything behind it."""
    acceptance = Acceptance(8)
    draft = Draft(FROM_BLOCK, (1, 2, 3), (0.2, 0.9, 0.7), ((11, 0.4), (12, 0.05), (13, 0.1)))
    assert acceptance.behind(FROM_BLOCK) == BEHIND_SECOND
    for _ in range(100):  # refused with no second choice that is right; refused as the last token
        acceptance.observe(Cycle(0, draft.tokens, 1, (1, 99), draft))
        acceptance.observe(Cycle(0, (1, 2, 13), 3, (1, 2, 13, 9), draft))
    assert acceptance.behind(FROM_BLOCK) == BEHIND_SECOND
    right = Cycle(0, (11, 2, 3), 2, (11, 2, 99), draft)
    wrong = Cycle(0, (11, 2, 3), 1, (11, 99), draft)
    for i in range(400):
        acceptance.observe(wrong if i % 4 else right)
    sure = acceptance.of_draft(draft, 2)[1]
    assert acceptance.behind(FROM_BLOCK) == pytest.approx(0.25 / sure, abs=0.1)
    for _ in range(400):
        acceptance.observe(right)
    assert acceptance.behind(FROM_BLOCK) == 1.0, "never worth more"


@settings(deadline=None, max_examples=25)
@given(
    per_row=st.sampled_from([0.0, 0.01, 0.1, 0.4]),
    misjudged=st.sampled_from([1.0, 2.0, 6.0]),
    first=st.floats(0, 1),
    second=st.floats(0, 1),
    changes=st.lists(st.integers(1, 150), max_size=3),
)
def test_time_lost_to_drafts_is_bounded(
    per_row: float, misjudged: float, first: float, second: float, changes: list[int]
) -> None:
    """At every moment: never more than the credit, a share of all time, and two cycles, the second
    to verify what the first one left. Whatever rows really cost, and however the drafter turns from
    good to bad and back."""
    machine = Machine(per_row, misjudged=misjudged)
    model = TwoChoices(machine, first, second)
    controller, sequence = Controller(machine, BLOCK), model.sequence([1, 2, 3], GREEDY)
    drive(model, prefill(sequence))
    machine.now, plain, worst = 0.0, 1e-2, 0.0
    turns = {sum(changes[: i + 1]) for i in range(len(changes))}
    for cycle in decode(model, sequence, controller, 300, clock=machine.clock):
        if turns & set(range(cycle.start, cycle.start + len(cycle.tokens))):
            model.first, model.second = 1 - model.first, 1 - model.second
        tokens = len(sequence.tokens) - 4
        worst = max(worst, cycle.seconds - plain * len(cycle.tokens))
        allowed = LOSS_CREDIT * plain + LOSS_SHARE * machine.now + 2 * worst
        allowed += controller.account.forgiven
        assert machine.now - plain * tokens <= allowed + 1e-9


def slower(cycle: Cycle, factor: float, company: int) -> Cycle:
    """The cycle on a machine so much slower, or with so many rows of others in its passes."""
    passes = tuple(replace(p, company=company, seconds=factor * p.seconds) for p in cycle.passes)
    return replace(cycle, passes=passes, seconds=factor * cycle.seconds)


@pytest.mark.parametrize(("company", "drafts"), [(500, True), (0, False)])
def test_the_rows_of_others_are_not_held_against_drafts(company: int, drafts: bool) -> None:
    """Passes that take ten times as long are a loss, unless it is others that made them long."""
    machine = Machine(0.01)
    cycles = cycles_of(
        MachineModel(machine, greedy_continuation, 6.0), Controller(machine, BLOCK), 200
    )
    controller = Controller(machine, BLOCK)
    for cycle in cycles:
        controller.observe(slower(cycle, 10.0, company))
    offer = Draft(FROM_BLOCK, (1, 2, 3), (0.99,) * 3)
    assert (controller.choose([offer], [], 9, 200) is offer) is drafts


def test_plain_rows_in_company_say_nothing_of_single_rows() -> None:
    """Of 1,000 plain cycles, those alone tell what one row takes."""
    seen: list[Pass] = []

    class Watched(Machine):
        def observe(self, done: Pass, times: int = 1) -> None:
            seen.append(done)

    machine = Watched(0.9)
    controller = Controller(machine, None)
    for i in range(1000):
        done = Pass(1, 0, i, 1e-2) if i % 2 else Pass(1, 0, i, 7e-2, company=30)
        controller.observe(Cycle(i, (), 0, (5,), passes=(done,), seconds=2 * done.seconds))
    singles = [done.seconds for done in seen if not done.company]
    assert singles == pytest.approx([1e-2] * len(singles))
    assert len(singles) > 5
    assert sum(done.company == 30 for done in seen) == 500


def test_models_without_heads_look_up() -> None:
    machine = Machine(0.05)
    controller = Controller(machine, None)
    sequence = ToyModel(heads=False).sequence([1], GREEDY)
    sources = [type(d).__name__ for d in controller.drafters(sequence)]
    assert {"TailDrafter", "LookupDrafter"} <= {*sources}
    assert not {"BlockDrafter", "CarriedBlocks"} & {*sources}
    assert controller.choose([], [], 5, 10) is NO_DRAFT
    offer = Draft(LOOKUP, (1, 2, 3), (0.9, 0.9, 0.9))
    assert controller.choose([offer], [], 5, 10) is offer
    tree, guesses = controller.shape(offer, 0, 5, 10)
    assert (tree.tokens, tree.parents, guesses) == ((1, 2, 3), None, [])
    assert controller.choose([offer], [], 0, 10) is NO_DRAFT, "no token but the anchor's is wanted"


def test_what_takes_time_on_the_host_is_only_asked_where_rows_are_cheap() -> None:
    sequence = ToyModel(heads=False).sequence([1], GREEDY)
    for per_row, asked in ((0.05, True), (0.6, True), (0.9, False)):
        made = Controller(Machine(per_row), None).drafters(sequence)
        assert ("LookupDrafter" in [type(d).__name__ for d in made]) is asked
    without = Controller(Machine(0.05), None, without=["lookup"]).drafters(sequence)
    assert "LookupDrafter" not in [type(d).__name__ for d in without]
    assert "TailDrafter" in [type(d).__name__ for d in without]


@pytest.mark.parametrize(("confidence", "left_out"), [(0.05, 2), (0.95, 0)])
def test_what_hardly_pays_is_left_out_each_fourth_time(confidence: float, left_out: int) -> None:
    """So that single rows are timed beside it."""
    controller = Controller(Machine(0.0), None)
    draft = Draft(LOOKUP, (5,), (confidence,))
    chosen = [controller.choose([draft], (), 8, 64) for _ in range(8)]
    assert [found is NO_DRAFT for found in chosen].count(True) == left_out
    assert [i for i, found in enumerate(chosen, 1) if found is NO_DRAFT] == [4, 8][:left_out]


def test_phases_account_for_everything() -> None:
    machine = Machine(0.02)
    controller = Controller(machine, BLOCK)
    rate(machine, controller, 0.8)
    assert sum(phase.tokens for phase in controller.phases) >= 300
    assert sum(phase.seconds for phase in controller.phases) == pytest.approx(machine.now)


def cycle(accepted: int, confidence: Sequence[float], source: Source = FROM_BLOCK) -> Cycle:
    tokens = tuple(range(len(confidence)))
    draft = Draft(source, tokens, tuple(confidence))
    passes = [Pass(len(tokens) + 1, 0, 0, 1.0)]
    if source == FROM_BLOCK:
        passes.insert(0, Pass(0, len(tokens) + 1, 0, 1.0))
    return Cycle(0, tokens, accepted, (*tokens[:accepted], 99), draft, tuple(passes))


def test_acceptance_is_learned_per_confidence() -> None:
    """Tokens given 55 % are always accepted here, tokens given 35 % never."""
    acceptance = Acceptance(8)
    for _ in range(100):
        acceptance.observe(cycle(2, [0.55, 0.55, 0.35, 0.55]))
    high, low = acceptance.of_draft(Draft(FROM_BLOCK, (1, 2), (0.55, 0.35)), 2)
    assert high > 0.95
    assert low < 0.1
    by_position = acceptance.of_source(FROM_BLOCK, 4)
    assert by_position[0] > 0.9
    assert by_position[2] < 0.1
    assert by_position[3] == pytest.approx(0.7), "what was never reached is not known"


def test_sources_are_told_apart_and_forgotten() -> None:
    acceptance = Acceptance(8)
    for _ in range(100):
        acceptance.observe(cycle(0, [0.8], TAIL))
    tail, block = (acceptance.of_draft(Draft(s, (1,), (0.8,)), 1)[0] for s in (TAIL, FROM_BLOCK))
    assert tail < 0.2 < 0.8 < block
    for _ in range(2000):
        acceptance.relax(0.995)
    assert acceptance.of_draft(Draft(TAIL, (1,), (0.8,)), 1)[0] == pytest.approx(block, rel=1e-2)


def test_sums() -> None:
    assert sums([0.5, 0.4]) == pytest.approx([0.0, 0.5, 0.7])
