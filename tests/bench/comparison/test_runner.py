"""Turns on a toy model: their order, one policy per entry, and texts that differ end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from toy_model import VOCAB, ToyModel, toy_config

from orthrus_gguf.bench.comparison.entries import Entry
from orthrus_gguf.bench.comparison.prompts import Prompt
from orthrus_gguf.bench.comparison.runner import Turn, run_turns, warm_up
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, Plan, Strategy, parse
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import Logits, Segment, View
from orthrus_gguf.sampling import SamplingSettings

PROMPTS = [Prompt("code", f"code {i}", (i, 2, 3)) for i in (1, 2)] + [
    Prompt("list", "list 1", (9,))
]
GREEDY = SamplingSettings(temperature=0)


class Watched(FixedPolicy):
    """Counts the cycles that it learns from."""

    def __init__(self) -> None:
        super().__init__(Plan(Strategy.FUSED, 3, 2, tail=True), toy_config())
        self.seen = 0

    def observe(self, cycle: Cycle) -> None:
        self.seen += 1


class Leaky(ToyModel):
    """A row of its AR passes is not what it would be alone."""

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        logits = super().logits(segments)
        if segments[0].view is View.AR and segments[0].start and len(segments[0]) > 2:
            logits[0][1] = -logits[0][1]
        return logits


class ToyTokenizer:
    """Every id is a letter, and no text ends by itself."""

    eog: frozenset[int] = frozenset()
    space_prefix = False

    def token_bytes(self, id: int) -> bytes:
        return bytes([64 + id % 26])

    def is_special(self, id: int) -> bool:
        return False

    def special_id(self, text: str) -> int | None:
        return None


def entry(spelling: str) -> Entry:
    return Entry(spelling, FixedPolicy(parse(spelling), toy_config()))


def session(model: ToyModel) -> Session:
    tokenizer: Any = ToyTokenizer()
    return Session(model, tokenizer, 64)


def run(model: ToyModel, entries: list[Entry], sampling: SamplingSettings = GREEDY) -> list[Turn]:
    return list(
        run_turns(session(model), entries, PROMPTS, sampling, max_tokens=20, rounds=2),
    )


def test_turns_rotate_within_a_prompt() -> None:
    watched = Watched()
    entries = [
        entry("ar"),
        entry("two-pass@3"),
        Entry("watched", watched),
    ]
    sampling = SamplingSettings(temperature=1, seed=3)
    turns = run(ToyModel(sureness=3), entries, sampling)
    order = [(turn.round, turn.prompt.name, turn.entry) for turn in turns]
    a, b, c = (entry.name for entry in entries)
    assert order[:9] == [
        *((0, "code 1", name) for name in (a, b, c)),
        *((0, "code 2", name) for name in (b, c, a)),
        *((0, "list 1", name) for name in (c, a, b)),
    ]
    assert order[9:12] == [(1, "code 1", name) for name in (b, c, a)]
    assert len(turns) == 2 * 3 * 3
    assert {len(turn.result.output) for turn in turns} == {20}
    assert len({turn.result.output for turn in turns}) == len(PROMPTS)
    # One policy learns from all prompts and rounds.
    cycles = [len(turn.result.cycles) for turn in turns if turn.entry == "watched"]
    assert watched.seen == sum(cycles)


def test_a_text_that_differs_ends_the_comparison() -> None:
    entries = [entry("ar"), entry("two-pass@3")]
    with pytest.raises(OrthrusError, match="prompt 'code 1': two-pass@3 and ar differ from") as it:
        run(Leaky(), entries)
    assert "\n" not in str(it.value)


def test_where_texts_part() -> None:
    """The message names the first token that differs, or says that one text has ended."""
    entries = [entry("ar")]
    model = ToyModel()
    turns = run_turns(session(model), entries, PROMPTS, GREEDY, max_tokens=8, rounds=2)
    first = next(turns)
    right = first.result.output
    for _ in PROMPTS[1:]:
        next(turns)
    model.ar_logits = lambda prefix: _other(right, prefix)
    with pytest.raises(OrthrusError, match=rf"token 5 on \(id 0 and id {right[5]}\)"):
        next(turns)


def _other(right: Sequence[int], prefix: Sequence[int]) -> Logits:
    """One-hot logits of `right`, but for its sixth token."""
    from toy_model import one_hot

    at = len(prefix) - len(PROMPTS[0].tokens)
    token = right[at] if 0 <= at < len(right) and at != 5 else 0
    assert right[5] != 0
    return one_hot(token % VOCAB)


def test_warm_up_runs_every_entry() -> None:
    model, watched = ToyModel(), Watched()
    entries = [entry("ar"), Entry("watched", watched)]
    warm_up(session(model), entries, PROMPTS[0], GREEDY)
    assert watched.seen > 0
    assert model.forwards > watched.seen + 7
