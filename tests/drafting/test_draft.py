"""Drafts, guesses at the outcome of their verification, and what becomes of both."""

from __future__ import annotations

import numpy as np
import pytest
from toy_model import VOCAB, ar_logits, one_hot

from orthrus_gguf.drafting.draft import (
    Draft,
    Guess,
    Hypothesis,
    Source,
    hypotheses,
    read_draft,
    remainder,
)
from orthrus_gguf.sampling import Sampler, SamplingSettings

GREEDY = Sampler(SamplingSettings(temperature=0))
DRAFT = Draft(Source.BLOCK, (5, 6, 7), (0.9, 0.5, 0.8), ((15, 0.05), (16, 0.25), (17, 0.1)))


def test_a_draft_is_read_row_by_row() -> None:
    logits = np.stack([ar_logits([i]) for i in range(4)])
    draft = read_draft(GREEDY, [1, 2], logits, Source.BLOCK)
    assert draft.tokens == tuple(logits.argmax(1))
    weights = np.exp(logits.astype(np.float64))
    best = weights.max(1) / weights.sum(1)
    assert draft.confidence == pytest.approx(best.tolist(), rel=1e-5)
    seconds = np.sort(weights, 1)[:, -2] / weights.sum(1)
    assert [token for token, _ in draft.second] == np.argsort(logits, 1)[:, -2].tolist()
    assert [p for _, p in draft.second] == pytest.approx(seconds.tolist(), rel=1e-5)


def test_a_draft_ends_where_the_drafter_breaks() -> None:
    logits = np.stack([ar_logits([i]) for i in range(4)])
    logits[2, 7] = np.nan
    assert len(read_draft(GREEDY, [1], logits, Source.BLOCK)) == 2


def test_drafts_are_drawn_as_verification_will_draw() -> None:
    sampler = Sampler(SamplingSettings(temperature=1.3, seed=4, repeat_penalty=1.4))
    logits = np.stack([ar_logits([i]) for i in range(8)])
    prefix = [3, 1]
    draft = read_draft(sampler, prefix, logits, Source.NEXT)
    for row, token in zip(logits, draft.tokens, strict=True):
        assert token == sampler.sample(row, prefix)
        prefix.append(token)


def test_guesses_share_out_all_outcomes() -> None:
    """Probabilities by hand: 0.1 none, 0.45 one, 0.09 two accepted, 0.36 all three."""
    guesses = list(hypotheses(DRAFT, 3, [0.9, 0.5, 0.8], anchor=1))
    assert {(g.guess, g.accepted): g.anchor for g in guesses} == {
        (Guess.NEXT, 0): 15,
        (Guess.LAST, 1): 5,
        (Guess.NEXT, 1): 16,
        (Guess.LAST, 2): 6,
        (Guess.NEXT, 2): 17,
        (Guess.LAST, 3): 7,
    }
    assert {f"{g.guess.value}{g.accepted}": g.probability for g in guesses} == pytest.approx(
        {"B0": 0.05, "A1": 0.45, "B1": 0.225, "A2": 0.09, "B2": 0.045, "A3": 0.36}
    )


def test_what_is_left_of_a_draft_names_the_next_anchor_if_all_are_accepted() -> None:
    (guess,) = [
        g
        for g in hypotheses(DRAFT, 2, [0.9, 0.5, 0.8], 1)
        if g.accepted == 2 and g.guess is Guess.NEXT
    ]
    assert guess.anchor == 7
    assert guess.probability == pytest.approx(0.45 * 0.8)


@pytest.mark.parametrize("source", Source)
def test_a_block_at_the_anchor_is_only_carried_if_there_was_none(source: Source) -> None:
    draft = Draft(source, (5,), (0.5,))
    found = [g for g in hypotheses(draft, 1, [0.5], 1) if g.accepted == 0]
    assert [(g.guess, g.anchor) for g in found] == (
        [] if source in (Source.BLOCK, Source.NEXT) else [(Guess.LAST, 1)]
    )


@pytest.mark.parametrize(
    ("accepted", "committed", "left", "source"),
    [
        (0, [9], (6, 7), Source.TAIL),  # refused at once: the tail is stale
        (1, [5, 9], (7,), Source.TAIL),
        (1, [5, 6], (7,), Source.BLOCK),  # one verified, and the draft went on to be right
        (3, [5, 6, 7, 9], (), None),
    ],
)
def test_what_is_left_of_a_draft(
    accepted: int, committed: list[int], left: tuple[int, ...], source: Source | None
) -> None:
    rest = remainder(DRAFT, accepted, committed)
    assert rest.tokens == left
    assert source is None or rest.source is source


def test_guess_b_serves_only_the_anchor_it_was_made_for() -> None:
    logits = np.stack([one_hot(30), one_hot(31)])
    guess = Hypothesis(Guess.NEXT, 1, 16, 0.2, 2)
    assert guess.offset == 2
    assert guess.resolve(GREEDY, [1, 5, 16], 0, logits) is None
    assert guess.resolve(GREEDY, [1, 5, 17], 1, logits) is None
    draft = guess.resolve(GREEDY, [1, 5, 16], 1, logits)
    assert draft is not None
    assert (draft.source, draft.tokens) == (Source.NEXT, (30, 31))


def test_guess_a_drops_its_row_for_the_anchor_and_doubts_what_missed_it() -> None:
    guess = Hypothesis(Guess.LAST, 1, 5, 0.4, 3)
    assert guess.offset == 1
    logits = np.stack([one_hot(16, 5), one_hot(30, 5), one_hot(31, 5)])
    named = guess.resolve(GREEDY, [1, 5, 16], 1, logits)
    missed = guess.resolve(GREEDY, [1, 5, 40], 1, logits)
    assert named is not None
    assert missed is not None
    assert named.tokens == missed.tokens == (30, 31)
    sure = np.exp(5) / (np.exp(5) + VOCAB - 1)
    assert named.confidence[0] == pytest.approx(sure, rel=1e-5)
    assert missed.confidence[0] == pytest.approx(sure * (1 - sure), rel=1e-4)
    assert named.confidence[1] == missed.confidence[1]
