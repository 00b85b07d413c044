"""Drafters that only this file knows: an entry of the registry is all that it takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from comparison_turns import turn
from matplotlib.colors import to_hex
from timeless import Timeless
from toy_model import (
    BLOCK,
    VOCAB,
    ToyModel,
    ToyTokenizer,
    greedy_continuation,
    tapped,
)

from orthrus_gguf.auto.account import LOSS_CREDIT, LOSS_SHARE
from orthrus_gguf.bench.comparison import plots
from orthrus_gguf.decode import offered
from orthrus_gguf.drafting import registry
from orthrus_gguf.drafting.block import BLOCK as FROM_BLOCK
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.drafter import Drafter, DraftPass, Results
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.request import Request, Result
from orthrus_gguf.runtime.protocol import Choices, Segment
from orthrus_gguf.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0)
TOY = Source("toy", "toy words", "#123456", 0.9)


class Endless(ToyTokenizer):
    """No token ends the text."""

    eog: frozenset[int] = frozenset()


ENDLESS: Any = Endless()

Register = Callable[[Callable[[TokenSequence], Drafter]], None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Makes a drafter known as `toy`."""

    def add(make: Callable[[TokenSequence], Drafter]) -> None:
        monkeypatch.setitem(registry.KINDS, "toy", registry.Kind(make))

    return add


class Silent:
    """Proposes nothing."""

    taps: tuple[int, ...] = ()

    def __init__(self, sequence: TokenSequence) -> None:
        pass

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft | DraftPass]:
        assert room >= 1
        return ()

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        pass


class Oracle(Silent):
    """Has four tokens at hand that greedy decoding will say."""

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft | DraftPass]:
        found = tuple(greedy_continuation(list(tokens), min(room, 4)))
        return (Draft(TOY, found, (0.9,) * len(found)),)


class Garbage(Silent):
    """Any tokens, of any length and confidence, with any second choices."""

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft | DraftPass]:
        luck = random.Random(len(tokens))
        count = luck.choice([0, 1, room, room + 1, 3 * room + 40])
        found = tuple(luck.choices(range(VOCAB), k=count))
        sure = tuple(luck.choice([0.0, 0.3, 0.99, 1.0]) for _ in found)
        second = tuple((luck.randrange(VOCAB), luck.choice([0.0, 0.5, 1.0])) for _ in found)
        return [Draft(TOY, found, sure, second if luck.random() < 0.5 else ())] * 2


def policy(plan: str, model: ToyModel) -> Policy:
    if plan == "auto":
        return Timeless(0.01, model.config.block_size)
    return FixedPolicy(parse(plan), model.config)


def wrong(prefix: Sequence[int], rows: int) -> list[int]:
    return [(t + 1) % VOCAB for t in greedy_continuation(prefix, rows)]


def generated(
    plan: str | Policy,
    model: ToyModel,
    n: int = 60,
    prompt: Sequence[int] = (1, 2, 3),
    sampling: SamplingSettings = GREEDY,
    batch: int = 512,
) -> Result:
    session = Session(model, ENDLESS, 500, prompt_batch=batch)
    made = policy(plan, model) if isinstance(plan, str) else plan
    generation = session.generate(Request(tuple(prompt), sampling, made, max_tokens=n))
    for _ in generation:
        pass
    return generation.result


PLANS = ["ar+toy", "two-pass@4+toy", "two-pass@5+toy+tree=9", "fused@4x2+toy+tail", "auto"]


def test_it_is_spelt(register: Register) -> None:
    with pytest.raises(OrthrusError, match=r"ar takes \+lookup.*, not \+toy"):
        parse("ar+toy")
    register(Oracle)
    for text in ("ar+toy", "two-pass@3+lookup+toy+tail", "fused+toy", "auto+no-toy"):
        assert parse(text).text == text
    with pytest.raises(
        OrthrusError, match=r"ar takes \+lookup, \+dflash, \+mtp, \+toy, not \+tail"
    ):
        parse("ar+tail")


def test_its_drafts_are_used_and_counted(register: Register) -> None:
    plain = generated("ar", ToyModel(heads=False))
    register(Oracle)
    result = generated("ar+toy", ToyModel(heads=False))
    assert result.output == plain.output
    assert result.statistics.cycles == 12
    assert {cycle.source for cycle in result.cycles[:-1]} == {TOY}
    assert result.statistics.sources == ((TOY, 12, 47, 47),)
    assert result.statistics.to_json()["sources"] == {
        "toy": {"cycles": 12, "drafted": 47, "accepted": 47}
    }


def test_auto_uses_it_unless_told_not_to(register: Register) -> None:
    register(Oracle)
    model = ToyModel(wrong, sureness=3.0)
    result = generated("auto", model, 200)
    (used,) = [counts for source, *counts in result.statistics.sources if source == TOY]
    assert used[2] > 120
    without = Timeless(0.01, BLOCK, without=["toy"])
    assert TOY not in [source for source, *_ in generated(without, model).statistics.sources]


def test_auto_learns_what_it_is_worth(register: Register) -> None:
    """Of tokens it is sure of that are never right, few are tried: what they cost, a tenth of a
    pass each, may be two passes and a small share of the time."""

    class Liar(Oracle):
        def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft | DraftPass]:
            (draft,) = super().propose(tokens, room)
            assert isinstance(draft, Draft)
            return (Draft(TOY, tuple((t + 1) % VOCAB for t in draft.tokens), draft.confidence),)

    register(Liar)
    result = generated(Timeless(0.1, None), ToyModel(heads=False), 400)
    tried = [i for i, cycle in enumerate(result.cycles) if cycle.source == TOY]
    assert 1 <= len(tried) < 80
    lost = 0.1 * sum(len(result.cycles[i].drafts) for i in tried)
    assert lost < LOSS_CREDIT + LOSS_SHARE * (400 + lost) + 0.4
    assert result.statistics.tokens_per_cycle == 1.0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_garbage_costs_no_text(register: Register, plan: str, temperature: float) -> None:
    sampling = SamplingSettings(temperature=temperature, seed=5)
    plain = generated("ar", ToyModel(), sampling=sampling)
    register(Garbage)
    result = generated(plan, ToyModel(greedy_continuation, sureness=2.0), sampling=sampling)
    assert result.output == plain.output
    assert all(len(cycle.tokens) == cycle.accepted + 1 for cycle in result.cycles)
    if plan == "ar+toy":
        assert [source for source, *_ in result.statistics.sources] == [TOY]


# --- passes of its own ---


class Passing(Silent):
    """Offers a pass: a block of which it reads nothing, since it knows better."""

    most = 3
    widths: list[int] = []  # noqa: RUF012 - a fresh list per test

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft | DraftPass]:
        self.tokens = list(tokens)
        return (DraftPass(TOY, self.most, lambda width: width, self.segments, self.read),)

    def segments(self, sequence: TokenSequence, width: int) -> list[Segment]:
        assert 1 <= width <= self.most
        self.widths.append(width)
        self.width = width
        return [sequence.block_segment(width)]

    def read(self, choices: Sequence[Choices]) -> Draft:
        assert [len(found) for found in choices] == [self.width]
        found = tuple(greedy_continuation(self.tokens, self.width))
        return Draft(TOY, found, (0.9,) * self.width)


@pytest.fixture
def passing(register: Register) -> type[Passing]:
    class Fresh(Passing):
        widths: list[int] = []  # noqa: RUF012

    register(Fresh)
    return Fresh


def test_a_pass_of_its_own_brings_drafts(passing: type[Passing]) -> None:
    """No wider than it can be, nor than there is room for: 15 cycles of four tokens, less one."""
    result = generated("ar+toy", ToyModel(wrong), 60)
    assert result.output == generated("ar", ToyModel()).output
    assert [len(cycle.passes) for cycle in result.cycles] == [2] * 15
    assert passing.widths == [3] * 14 + [2]
    assert result.cycles[0].passes[0].diffusion_rows == 3
    assert result.statistics.sources == ((TOY, 15, 44, 44),)


def test_auto_orders_the_better_pass(passing: type[Passing]) -> None:
    """Blocks are always wrong here."""
    result = generated(Timeless(0.01, BLOCK), ToyModel(wrong, sureness=3.0), 400)
    assert result.output == generated("ar", ToyModel(), 400).output
    orders = [cycle.draft.source for cycle in result.cycles if len(cycle.passes) == 2]
    assert orders.count(TOY) > 60
    assert FROM_BLOCK not in orders[40:]
    assert len(result.cycles) < 200


def test_nobody_is_asked_for_the_last_token(register: Register) -> None:
    class Asked(Silent):
        def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft | DraftPass]:
            rooms.append(room)
            return ()

    rooms: list[int] = []
    register(Asked)
    generated("ar+toy", ToyModel(heads=False), 5)
    assert rooms == [3, 2, 1]
    assert offered([Asked(ToyModel().sequence([1, 2], GREEDY))], [1, 2], 0) == ([], [])


# --- taps ---


@dataclass
class Reader:
    """Reads what the residual stream holds at some layers, in its own order."""

    sequence: TokenSequence
    taps: tuple[int, ...] = (2, 0)
    seen: list[tuple[int, int]] = field(default_factory=list)

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft | DraftPass]:
        return Oracle(self.sequence).propose(tokens, room)

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        assert results.taps is not None
        planes, rows, width = results.taps.shape
        assert (planes, width) == (len(self.taps), self.sequence.config.n_embd)
        if cycle is not None:
            assert (results.start, rows) == (cycle.start, cycle.accepted + 1)
        for row in range(rows):
            position = results.start + row
            token = tokens[position]
            for plane, layer in enumerate(self.taps):
                assert set(results.taps[plane, row].tolist()) == {tapped(layer, token)}
            self.seen.append((position, token))


@pytest.mark.parametrize("batch", [2, 512])
@pytest.mark.parametrize("plan", PLANS)
def test_taps_are_those_of_the_committed_rows(
    register: Register, plan: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the prompt, and of every cycle the path that stays: each once, in order, with nothing of
    what was refused. Beside a drafter that reads other layers."""
    readers: list[Reader] = []

    def make(sequence: TokenSequence, taps: tuple[int, ...]) -> Reader:
        readers.append(Reader(sequence, taps))
        return readers[-1]

    register(lambda sequence: make(sequence, (2, 0)))
    monkeypatch.setitem(registry.KINDS, "other", registry.Kind(lambda c: make(c, (1,))))
    plan = plan.replace("+toy", "+toy+other")
    prompt = (5, 4, 3, 2, 1)
    result = generated(plan, ToyModel(half_right, sureness=2.0), 40, prompt, batch=batch)
    tokens = [*prompt, *result.output]
    assert len(readers) == 2
    for reader in readers:
        assert reader.seen == list(enumerate(tokens))[:-1]


def half_right(prefix: Sequence[int], rows: int) -> list[int]:
    right = greedy_continuation(prefix, rows)
    good = len(prefix) % (rows + 1)
    return right[:good] + [(t + 1) % VOCAB for t in right[good:]]


def test_what_the_cache_held_already_is_not_told_again(register: Register) -> None:
    """A second prompt that goes on from the first: rows from where it starts to differ."""
    readers: list[Reader] = []

    def make(sequence: TokenSequence) -> Reader:
        readers.append(Reader(sequence))
        return readers[-1]

    register(make)
    model = ToyModel(heads=False)
    session = Session(model, ENDLESS, 200)
    for prompt in ((1, 2, 3), (1, 2, 9, 9)):
        request = Request(prompt, GREEDY, policy("ar+toy", model), max_tokens=3)
        list(session.generate(request))
    assert readers[0].seen[0] == (0, 1)
    assert readers[1].seen[:2] == [(2, 9), (3, 9)]


def test_nothing_is_tapped_that_nobody_reads(register: Register) -> None:
    tapped_layers: set[tuple[int, ...]] = set()

    class Watched(ToyModel):
        def forward(self, segments: Sequence[Segment]) -> list[Choices]:
            tapped_layers.update(segment.taps for segment in segments)
            return super().forward(segments)

    generated("fused@4x2+lookup+tail", Watched())
    assert tapped_layers == {()}
    tapped_layers.clear()
    register(Reader)
    generated("ar+toy", Watched())
    assert tapped_layers == {(0, 2)}


# --- pictures ---


def test_it_is_drawn_in_its_colour_and_words(register: Register) -> None:
    register(Oracle)
    result = generated("ar+toy", ToyModel(heads=False))
    figure = plots.widths("", [turn("ar+toy", "code 1", 1.0, list(result.cycles))])
    assert to_hex(figure.axes[0].patches[0].get_facecolor()) == TOY.colour
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [TOY.words, "accepted"]
