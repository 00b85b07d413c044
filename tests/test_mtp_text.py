"""The text of a hybrid never depends on its MTP drafts: plans, types of weights and caches, cuts of
the prompt, company, and states that were gone back to or moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest
from mtp_models import loaded_mtp, mtp_model
from same_text import (
    ENDLESS,
    PAUSING,
    check_pairs,
    check_side_by_side,
    finished,
    request,
)

from orthrus_gguf.engine import Session
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName

#: Shorter than the convolution's kernel, as long, longer.
LENGTHS = (1, 2, 3, 3, 4, 5, 21, 40)
_RNG = np.random.default_rng(3)
PROMPTS: list[list[int]] = [_RNG.integers(0, 256, n).tolist() for n in LENGTHS]
TOKENS = 16

#: Prompt rows of a pass. 33: more than may be dropped again.
CUTS = (512, 1, 3, 33)

PLANS = (
    "ar+lookup",
    "two-pass@1",
    "two-pass@2",
    "two-pass@3",
    "two-pass@8+lookup",
    "two-pass@2+tail",
    "two-pass@4+tree=6",
    "two-pass@3+tree=12+lookup",
    "two-pass+cut=0.02",
    "ar+mtp",
    "auto",
    "auto+no-mtp",
    PAUSING,
)
#: Those that draft with the block.
WITH_MTP = tuple(plan for plan in PLANS if plan not in ("ar+lookup", "auto+no-mtp"))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are kept every few rows."""
    monkeypatch.setattr("orthrus_gguf.runtime.checkpoints.CHECKPOINT_ROWS", 5)


def loaded(weights: str, cache: str) -> Any:
    types: dict[str, Any] = {"cache_type_k": cache, "cache_type_v": cache}
    return loaded_mtp(mtp_model(weights, wide=True), RuntimeName.CPU, **types)


def check_turns(
    model: ModelWithDrafter,
    plans: Sequence[str],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
) -> int:
    """A second turn that parts from the first one's answer: on the same session, which goes back to
    a state of before; and on another one, to which such a state was moved. Each plan has the text
    of plain decoding from the start. Returns the pairs that did not begin anew."""
    kept = 0
    for i, (seed, prompt) in enumerate((seed, prompt) for seed in seeds for prompt in prompts):
        plan = plans[i % len(plans)]
        session = Session(model, ENDLESS, 128, prompt_batch=CUTS[i % len(CUTS)])
        first = finished(session.generate(request(model, plan, prompt, seed, TOKENS)))
        edited = [*prompt, *first.output[:7], 9, 8, 7]
        fresh = Session(model, ENDLESS, 128)
        expected = finished(fresh.generate(request(model, "ar", edited, seed, TOKENS)))
        place = session.reachable(len(prompt) + 7)
        other = Session(model, ENDLESS, 128)
        other.put(session.take(session.held[:place]))
        for mine in (session, other):
            found = finished(mine.generate(request(model, plan, edited, seed, TOKENS)))
            assert found.output == expected.output, (plan, seed, prompt)
            kept += found.statistics.cached_tokens > 0
    return kept


def check_company(
    model: ModelWithDrafter, plans: Sequence[str], prompts: Sequence[Sequence[int]]
) -> None:
    """Two, three and four sequences in a pass, whose plans go by turns."""
    turns: Iterator[str] = cycle(plans)
    for size in (2, 3, 4):
        for first in range(0, len(prompts) - size + 1, size):
            some = prompts[first : first + size]
            check_side_by_side(model, list(islice(turns, size)), some, TOKENS)


@pytest.mark.parametrize(("weights", "cache"), [("q4_k_m", "f16"), ("q8_0", "q4_0")])
def test_plans(weights: str, cache: str, often: None) -> None:
    with loaded(weights, cache) as model:
        accepted = check_pairs(model, PLANS, PROMPTS[1::3], (0,), TOKENS, CUTS)
        assert min(accepted[plan] for plan in WITH_MTP) > 3, accepted
        assert accepted["ar+lookup"] == accepted["auto+no-mtp"] == 0
        assert check_turns(model, PLANS[:4], PROMPTS[2:6], (0,)) >= 4
        check_company(model, PLANS, PROMPTS[2:6])


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("weights", ["f32", "q8_0", "q4_k_m"])
def test_every_plan_on_many_seeds(weights: str, cache: str, often: None) -> None:
    """Eight prompts and six seeds for each of the twelve: 576 pairs."""
    seeds = range(6)
    with loaded(weights, cache) as model:
        accepted = check_pairs(model, PLANS, PROMPTS, seeds, TOKENS, CUTS)
        assert min(accepted[plan] for plan in WITH_MTP) > 48, accepted
        assert check_turns(model, PLANS, PROMPTS, seeds) > 48
        check_company(model, PLANS, PROMPTS)
