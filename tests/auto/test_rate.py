"""Going rates against figures that can be worked out by hand, and guesses against brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest

from orthrus_gguf.auto.carried_blocks import LEAST, NEWEST, Riding, by_worth
from orthrus_gguf.auto.rate import Estimates, best_width, outlook, values
from orthrus_gguf.decode import Cycle, Strategy
from orthrus_gguf.drafting.draft import Guess, Hypothesis

NOTHING = dict.fromkeys(Guess, 0.0)


def estimates(
    *,
    block: list[float],
    carried: list[float] | None = None,
    per_row: float = 0.0,
    draft: float = 1.0,
    lead: float = 100.0,
    hits: dict[Guess, float] = NOTHING,
    riding: float = 0.0,
) -> Estimates:
    """Passes of one row take a second. Without more, blocks that ride are far too dear."""
    count = len(block)
    return Estimates(
        verify=np.array([0.0, *(1 + per_row * rows for rows in range(count))]),
        draft=np.array([0.0] + [draft] * (count - 1)),
        lead=lead,
        block=np.array(block),
        carried={guess: np.array(carried or [0.0]) for guess in Guess},
        hits=hits,
        riding=riding,
    )


def test_two_passes() -> None:
    """Three of three drafts accepted: four tokens in two seconds."""
    found = outlook(estimates(block=[0, 1, 2, 3]), blocks=1, width=3, lookup=False)
    assert found.plan.strategy is Strategy.TWO_PASS
    assert found.plan.width == 3
    assert found.rate == pytest.approx(2.0, rel=2e-3)


def test_the_width_follows_from_what_rows_cost() -> None:
    """Half a second per row: (1 + 1) tokens in 2.5 s, (2 + 1) in 3 s, (2.1 + 1) in 3.5 s."""
    found = outlook(estimates(block=[0, 1, 2, 2.1], per_row=0.5), blocks=1, width=3, lookup=False)
    assert (found.plan.strategy, found.rate) == (Strategy.AR, 1.0)
    cheaper = outlook(estimates(block=[0, 1, 2, 2.1], per_row=0.2), blocks=1, width=3, lookup=False)
    assert cheaper.plan.width == 2
    assert cheaper.rate == pytest.approx(3 / 2.4, rel=2e-3)


def test_drafts_that_are_wrong_mean_plain_decoding() -> None:
    found = outlook(estimates(block=[0, 0.5, 0.6]), blocks=1, width=2, lookup=True)
    assert found.plan.strategy is Strategy.AR
    assert found.plan.lookup
    assert found.rate == 1.0


def test_a_block_alongside_plain_decoding() -> None:
    """By turns: a row with a block alongside (1.1 s), then its draft, two accepted: 4 tokens."""
    found = outlook(
        estimates(block=[0, 0, 0], carried=[0, 1, 2], lead=0.1), blocks=1, width=2, lookup=False
    )
    assert found.plan.strategy is Strategy.FUSED
    assert found.rate == pytest.approx(4 / 2.1, rel=2e-3)


def test_blocks_that_always_come_true() -> None:
    """Nine cycles of ten leave a block for the next one. From a miss to the next: a row with a
    block alongside, then on average ten cycles of three tokens, each with 0.2 s of riding blocks.
    """
    hits = {Guess.LAST: 0.0, Guess.NEXT: 0.9}
    found = outlook(
        estimates(block=[0, 0, 0], carried=[0, 1, 2], lead=0.2, hits=hits, riding=0.2),
        blocks=2,
        width=2,
        lookup=False,
    )
    assert (found.plan.strategy, found.plan.blocks, found.plan.width) == (Strategy.FUSED, 2, 2)
    assert found.rate == pytest.approx((1 + 30) / (1.2 + 10 * 1.2), rel=5e-3)


def test_a_gain_is_what_a_draft_pass_would_have_taken() -> None:
    e = estimates(block=[0, 1, 2, 3], carried=[0, 1, 2, 3])
    worth = values(e, 2.0)
    assert worth.drafting == pytest.approx(0.0)
    assert worth.gain[Guess.NEXT] == pytest.approx(2.0), "a second at two tokens per second"
    assert worth.plain == pytest.approx(-1.0)


def test_rows_of_blocks_that_ride_are_weighed_by_hits() -> None:
    n = np.array([0, 0.9, 1.7, 2.4, 3.0, 3.5, 3.9, 4.2, 4.4])
    carried, verify = dict.fromkeys(Guess, n), np.array([0.0] + [1.0] * 9)

    def widest(hits: float) -> int:
        return best_width(
            carried, dict.fromkeys(Guess, hits), verify, 1.0, lambda width: 0.3 * width
        )

    assert widest(0.5) > widest(0.3) > widest(0.1)


@pytest.mark.parametrize("seed", range(30))
def test_the_order_of_guesses_is_greedy(seed: int) -> None:
    """Against trying all of them at every step."""
    rng = random.Random(seed)
    last, following = rng.uniform(0.2, 2), rng.uniform(0.2, 3)
    guesses = [
        Hypothesis(guess, accepted, 1, rng.random())
        for accepted in range(5)
        for guess in Guess
        if rng.random() < 0.8
    ]
    guesses = [  # guess B of an outcome needs that outcome
        g
        if g.guess is Guess.LAST
        else Hypothesis(
            g.guess,
            g.accepted,
            1,
            g.probability
            * next(
                (h.probability for h in guesses if h.accepted == g.accepted and h is not g), 1.0
            ),
        )
        for g in guesses
    ]

    def worth(chosen: list[Hypothesis]) -> float:
        total = 0.0
        for accepted in range(5):
            a, b = (
                sum(g.probability for g in chosen if g.accepted == accepted and g.guess is guess)
                for guess in (Guess.LAST, Guess.NEXT)
            )
            total += max(a * last + b * (following - last), a * last) if a else b * following
        return total

    chosen: list[Hypothesis] = []
    for guess, more in by_worth(guesses, last, following):
        rest = [g for g in guesses if g not in chosen]
        best = max(worth([*chosen, g]) - worth(chosen) for g in rest)
        assert more == pytest.approx(best, abs=LEAST)
        assert worth([*chosen, guess]) - worth(chosen) == pytest.approx(more, abs=LEAST)
        chosen.append(guess)
    rest = [g for g in guesses if g not in chosen]
    assert all(worth([*chosen, g]) - worth(chosen) <= 2 * LEAST for g in rest)


def test_what_rode_is_remembered() -> None:
    riding = Riding(4.0, 2.0, 1.0, {Guess.LAST: 0.5, Guess.NEXT: 0.5})
    guesses = (Hypothesis(Guess.LAST, 1, 5, 0.5), Hypothesis(Guess.NEXT, 1, 9, 0.2))
    riding.observe(Cycle(0, (5, 6), 1, (5, 9), guesses=guesses), 3.0)
    assert riding.hits[Guess.NEXT] == pytest.approx(0.5 + NEWEST * 0.5), "the better one counts"
    assert riding.hits[Guess.LAST] == pytest.approx(0.5 - NEWEST * 0.5)
    riding.observe(Cycle(0, (5, 6), 1, (5, 8), guesses=guesses), 3.0)
    assert riding.hits[Guess.LAST] > 0.5 - NEWEST * 0.5
    assert riding.seconds == pytest.approx(1.0 + 2 * NEWEST * 2.0, rel=0.02)
