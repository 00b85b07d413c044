"""The decode loop on a toy model: same tokens as plain AR, whatever the drafter does."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import BLOCK, MASK, VOCAB, ToyModel, ar_logits, greedy_continuation, one_hot

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.decode import Cycle, Plan, Policy, Strategy, decode, plan_for, prefill
from orthrus_gguf.drafting.draft import Source
from orthrus_gguf.drafting.policy import Pass
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import View
from orthrus_gguf.sampling import Sampler, SamplingSettings

GREEDY = SamplingSettings(temperature=0)


def wrong(prefix: Sequence[int], rows: int) -> list[int]:
    return [(t + 1) % VOCAB for t in greedy_continuation(prefix, rows)]


def half_right(prefix: Sequence[int], rows: int) -> list[int]:
    right = greedy_continuation(prefix, rows)
    good = len(prefix) % (rows + 1)
    return right[:good] + [(t + 1) % VOCAB for t in right[good:]]


def noise(prefix: Sequence[int], rows: int) -> list[int]:
    return random.Random(len(prefix)).choices(range(VOCAB), k=rows)


def masks(prefix: Sequence[int], rows: int) -> list[int]:
    return [MASK] * rows


def ends(prefix: Sequence[int], rows: int) -> list[int]:
    return [VOCAB - 2] * rows


DRAFTERS = {
    "right": greedy_continuation,
    "wrong": wrong,
    "half": half_right,
    "noise": noise,
    "masks": masks,
    "ends": ends,
}


class Costs:
    """Seconds of passes as a straight line; what was observed is ignored."""

    def __init__(self, per_row: float) -> None:
        self.per_row = per_row

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return 1e-3 * (1 + self.per_row * (ar_rows + diffusion_rows - 1))

    def observe(self, done: Pass) -> None:
        pass


def any_plan(name: str, width: int, blocks: int, tail: bool, lookup: bool) -> Plan | Policy:
    """A plan of the strategy, or a controller to which rows are cheap (auto) or dear (dear)."""
    if name in ("auto", "dear"):
        return Controller(Costs(0.01 if name == "auto" else 0.6), BLOCK, lookup=lookup)
    strategy = Strategy(name)
    if strategy is Strategy.AR:
        return Plan(strategy, 0, lookup=lookup)
    return Plan(strategy, width, blocks, tail, lookup, cut=0.1 * (width % 3))


def run(
    model: ToyModel,
    prompt: list[int],
    sampling: SamplingSettings,
    plan: Plan | Policy,
    n: int,
    batch: int = 512,
) -> tuple[list[int], list[Cycle]]:
    """Tokens generated after the prompt, and the cycles."""
    cache, sampler = model.new_cache(10_000), Sampler(sampling)
    logits = prefill(model, cache, prompt, batch=batch)
    tokens = [*prompt, sampler.sample(logits, prompt)]
    cycles = list(decode(model, cache, sampler, tokens, plan, n - 1))
    assert cache.tokens == tokens[:-1]  # the cache holds all committed tokens but the anchor
    return tokens[len(prompt) :], cycles


def expected(prompt: list[int], sampling: SamplingSettings, n: int) -> list[int]:
    """AR decoding, spelled out."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(Sampler(sampling).sample(ar_logits(tokens), tokens))
    return tokens[len(prompt) :]


@settings(deadline=None, max_examples=300)
@given(
    drafter=st.sampled_from(sorted(DRAFTERS)),
    sureness=st.sampled_from([0.0, 3.0, 99.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    strategy=st.sampled_from(["ar", "two-pass", "fused", "auto", "dear"]),
    width=st.integers(1, BLOCK),
    blocks=st.integers(1, 6),
    tail=st.booleans(),
    lookup=st.booleans(),
    n=st.integers(1, 40),
    batch=st.integers(1, 25),
    sampling=st.builds(
        SamplingSettings,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 5]),
        repeat_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 2**64 - 1),
    ),
)
def test_tokens_do_not_depend_on_how_they_are_found(
    drafter: str,
    sureness: float,
    prompt: list[int],
    strategy: str,
    width: int,
    blocks: int,
    tail: bool,
    lookup: bool,
    n: int,
    batch: int,
    sampling: SamplingSettings,
) -> None:
    plan = any_plan(strategy, width, blocks, tail, lookup)
    model = ToyModel(DRAFTERS[drafter], sureness=sureness)
    output, cycles = run(model, prompt, sampling, plan, n, batch)
    assert output == expected(prompt, sampling, n)
    assert [t for c in cycles for t in c.tokens] == output[1:]
    for cycle in cycles:
        assert len(cycle.tokens) == cycle.accepted + 1
        assert cycle.tokens[: cycle.accepted] == cycle.drafts[: cycle.accepted]


@pytest.mark.parametrize("width", [1, 3, BLOCK])
def test_a_right_drafter_gets_every_draft_accepted(width: int) -> None:
    model = ToyModel(greedy_continuation)
    n = 1 + 5 * (width + 1)
    _, cycles = run(model, [1, 2, 3], GREEDY, Plan(Strategy.TWO_PASS, width), n)
    assert [c.accepted for c in cycles] == [width] * 5
    assert model.forwards == 1 + 2 * 5


def test_a_wrong_drafter_costs_passes_but_not_tokens() -> None:
    model = ToyModel(wrong)
    output, cycles = run(model, [1], GREEDY, Plan(Strategy.TWO_PASS, 4), 10)
    assert output == expected([1], GREEDY, 10)
    assert [c.accepted for c in cycles] == [0] * 9


def test_a_broken_drafter_costs_no_tokens() -> None:
    class Broken(ToyModel):
        def _segment(self, segment, cache):  # type: ignore[no-untyped-def]
            logits = super()._segment(segment, cache)
            if segment.view is View.DIFFUSION:
                logits[1:] = np.nan
            return logits

    output, cycles = run(Broken(), [1], GREEDY, Plan(Strategy.TWO_PASS, 4), 12)
    assert output == expected([1], GREEDY, 12)
    assert [len(c.drafts) for c in cycles] == [1] * 5 + [0]


def test_a_fused_pass_saves_the_draft_pass_of_the_next_cycle() -> None:
    """A right drafter's continuation is the next anchor, so one block (guess B) always serves."""
    model = ToyModel(greedy_continuation)
    width, cycles_wanted = 3, 6
    n = 1 + cycles_wanted * (width + 1)
    output, cycles = run(model, [1, 2], GREEDY, Plan(Strategy.FUSED, width, 1), n)
    assert output == expected([1, 2], GREEDY, n)
    assert [c.accepted for c in cycles] == [width] * cycles_wanted
    assert [len(c.passes) for c in cycles] == [2, *[1] * (cycles_wanted - 1)]
    assert [c.source for c in cycles] == [Source.BLOCK, *[Source.NEXT] * (cycles_wanted - 1)]


def test_a_wrong_guess_costs_a_draft_pass_and_nothing_else() -> None:
    model = ToyModel(wrong)
    output, cycles = run(model, [1], GREEDY, Plan(Strategy.FUSED, 4, 2), 10)
    assert output == expected([1], GREEDY, 10)
    assert all(len(c.passes) == 2 for c in cycles[:-1])


def test_guess_a_drafts_beyond_the_correction() -> None:
    """The drafter errs at one position only; the block at the last accepted draft goes on."""
    wrong_at = 6

    def errs_once(prefix: Sequence[int], rows: int) -> list[int]:
        right = greedy_continuation(prefix, rows)
        return [(t + 1) % VOCAB if len(prefix) + i == wrong_at else t for i, t in enumerate(right)]

    plan = Plan(Strategy.FUSED, 5, 8)
    output, cycles = run(ToyModel(errs_once, sureness=3.0), [1, 2], GREEDY, plan, 20)
    assert output == expected([1, 2], GREEDY, 20)
    after = next(i for i, c in enumerate(cycles) if c.start + c.accepted + 1 == wrong_at) + 1
    assert cycles[after].source is Source.LAST
    assert len(cycles[after].passes) == 1
    assert cycles[after].accepted == 5


def test_lookup_drafts_text_that_repeats() -> None:
    """Logits that only look at the last token repeat with a period; lookups then need no heads."""
    model = ToyModel(heads=False, logits=lambda prefix: one_hot((prefix[-1] + 1) % 5))
    output, cycles = run(model, [0], GREEDY, Plan(Strategy.AR, 0, lookup=True), 60)
    assert output == [(1 + i) % 5 for i in range(60)]
    assert cycles[-1].source is Source.LOOKUP
    assert model.forwards < 15


def test_drafts_never_reach_beyond_the_limit() -> None:
    _, cycles = run(ToyModel(), [5], GREEDY, Plan(Strategy.TWO_PASS, BLOCK), 7)
    assert [(c.start, len(c.drafts)) for c in cycles] == [(1, 5)]


def test_sampled_drafts_use_the_noise_of_their_positions() -> None:
    """A drafter with the AR view's own logits is never refused, at any temperature."""

    class SameLogits(ToyModel):
        def _segment(self, segment, cache):  # type: ignore[no-untyped-def]
            if segment.tokens[1:] and segment.tokens[1] == MASK:
                prefix, rows = [*cache.tokens[: segment.start], segment.tokens[0]], []
                for _ in segment.tokens:
                    rows.append(ar_logits(prefix))
                    prefix.append(Sampler(hot).sample(rows[-1], prefix))
                return rows[: len(segment.wanted)]
            return super()._segment(segment, cache)

    hot = SamplingSettings(temperature=1.2, top_k=0, top_p=1, min_p=0, seed=11)
    _, cycles = run(SameLogits(), [1, 2], hot, Plan(Strategy.TWO_PASS, 6), 29)
    assert [c.accepted for c in cycles] == [6] * 4


def test_plans_are_validated() -> None:
    model = ToyModel()
    assert plan_for(model, Strategy.TWO_PASS, None) == Plan(Strategy.TWO_PASS, BLOCK - 1)
    assert plan_for(model, Strategy.AR, 5) == Plan(Strategy.AR, 0)
    with pytest.raises(OrthrusError, match=r"--draft-width 9: must lie in 1\.\.8"):
        plan_for(model, Strategy.TWO_PASS, BLOCK + 1)
    with pytest.raises(OrthrusError, match="toy has no diffusion heads"):
        plan_for(ToyModel(heads=False), Strategy.TWO_PASS, None)
