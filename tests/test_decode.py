"""The decode loop on a toy model: same tokens as plain AR, whatever the drafter does."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import BLOCK, MASK, VOCAB, ToyModel, ar_logits, greedy_continuation

from orthrus_gguf.decode import Cycle, Plan, Strategy, decode, plan_for, prefill
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.sampling import Sampler, SamplingSettings
from orthrus_gguf.segments import View

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


DRAFTERS = {
    "right": greedy_continuation,
    "wrong": wrong,
    "half": half_right,
    "noise": noise,
    "masks": masks,
}


def run(
    model: ToyModel,
    prompt: list[int],
    sampling: SamplingSettings,
    plan: Plan,
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


@settings(deadline=None, max_examples=150)
@given(
    drafter=st.sampled_from(sorted(DRAFTERS)),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    width=st.integers(0, BLOCK),
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
def test_tokens_do_not_depend_on_drafts_widths_or_batches(
    drafter: str,
    prompt: list[int],
    width: int,
    n: int,
    batch: int,
    sampling: SamplingSettings,
) -> None:
    plan = Plan(Strategy.TWO_PASS if width else Strategy.AR, width)
    output, cycles = run(ToyModel(DRAFTERS[drafter]), prompt, sampling, plan, n, batch)
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
