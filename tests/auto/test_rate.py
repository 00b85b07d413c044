"""Going rates against figures that can be worked out by hand, and guesses against brute force."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from orthrus_gguf.auto.carrying import LEAST, NEWEST, Carrying, by_worth
from orthrus_gguf.auto.rate import Drafting, Estimates, Prospect, best_width, prospect, values
from orthrus_gguf.drafting.block import BLOCK
from orthrus_gguf.drafting.carried_blocks import NEXT
from orthrus_gguf.drafting.cycle import Cycle, Guess, Hypothesis
from orthrus_gguf.drafting.draft import Source
from orthrus_gguf.drafting.plan import Plan, Strategy

NOTHING = dict.fromkeys(Guess, 0.0)


def drafting(
    tokens: list[float], seconds: float = 1.0, widths: list[int] | None = None
) -> Drafting:
    """tokens: accepted of 0, 1, ... drafted ones; a chain, unless widths tell how deep it goes."""
    count = len(tokens) - 1
    deep = widths or list(range(1, count + 1))
    return Drafting(np.array(tokens[1:]), np.array(deep), np.array([seconds] * count))


def estimates(
    *,
    block: list[float],
    carried: list[float] | None = None,
    per_row: float = 0.0,
    draft: float = 1.0,
    lead: float = 100.0,
    hits: dict[Guess, float] = NOTHING,
    carrying: float = 0.0,
) -> Estimates:
    """Passes of one row take a second. Without more, blocks that ride along are far too dear."""
    return Estimates(
        verify=np.array([0.0, *(1 + per_row * rows for rows in range(len(block)))]),
        lead=lead,
        passes={BLOCK: drafting(block, draft)},
        carried={guess: np.array(carried or [0.0]) for guess in Guess},
        hits=hits,
        carrying=carrying,
    )


def found(e: Estimates, blocks: int = 1, width: int = 3) -> Prospect:
    return prospect(e, blocks=blocks, width=width)


def test_two_passes() -> None:
    """Three of three drafts accepted: four tokens in two seconds."""
    steady = found(estimates(block=[0, 1, 2, 3]))
    assert steady.plan == Plan(Strategy.TWO_PASS, 3)
    assert steady.rate == pytest.approx(2.0, rel=2e-3)
    assert steady.source == BLOCK


def test_the_width_follows_from_what_rows_cost() -> None:
    """Half a second per row: (1 + 1) tokens in 2.5 s, (2 + 1) in 3 s, (2.1 + 1) in 3.5 s."""
    steady = found(estimates(block=[0, 1, 2, 2.1], per_row=0.5))
    assert (steady.plan.strategy, steady.rate) == (Strategy.AR, 1.0)
    cheaper = found(estimates(block=[0, 1, 2, 2.1], per_row=0.2))
    assert cheaper.plan.width == 2
    assert cheaper.rate == pytest.approx(3 / 2.4, rel=2e-3)


def test_drafts_that_are_wrong_mean_plain_decoding() -> None:
    steady = found(estimates(block=[0, 0.5, 0.6]), width=2)
    assert steady == Prospect(Plan(Strategy.AR), 1.0)


def test_a_tree_where_it_brings_more() -> None:
    """Four nodes, two deep: three tokens of (2 + 1) in two seconds, where the chain brings 1.3."""
    chain, tree = [0, 1.0, 1.3], [0, 1.0, 1.5, 1.9, 2.0]
    e = estimates(block=tree)
    deep = drafting(tree, widths=[1, 1, 2, 2])
    steady = found(replace(e, passes={BLOCK: deep}))
    assert steady.plan == Plan(Strategy.TWO_PASS, 2, tree=4)
    assert steady.rate == pytest.approx(3 / 2, rel=2e-3)
    assert found(estimates(block=chain)).plan.tree == 0
    dear = replace(e, passes={BLOCK: deep}, verify=np.array([0.0, 1, 1, 1.01, 1.5, 2]))
    assert found(dear).plan == Plan(Strategy.TWO_PASS, 1, tree=2), "rows that cost are left out"


def test_the_best_kind_of_pass_is_taken() -> None:
    """One brings three tokens in a second, the other two in a tenth of one: (2 + 1) in 1.1 s."""
    quick = Source("quick", "quick", "#000000", 0.5)
    e = estimates(block=[0, 1, 2, 3])
    both = replace(e, passes={BLOCK: e.passes[BLOCK], quick: drafting([0, 1, 2], 0.1)})
    steady = found(both)
    assert (steady.source, steady.plan.width) == (quick, 2)
    assert steady.rate == pytest.approx(3 / 1.1, rel=2e-3)
    worth = values(both, 3 / 1.1)
    assert (worth.source, worth.width, worth.nodes) == (quick, 2, 2)
    assert worth.drafting == pytest.approx(0.0)


def test_without_passes_there_is_only_plain_decoding() -> None:
    """Of a model without heads."""
    none = Estimates(
        np.array([0.0, 1, 1, 1]), 0.0, {}, {guess: np.zeros(0) for guess in Guess}, NOTHING, 0.0
    )
    assert found(none) == Prospect(Plan(Strategy.AR), 1.0)
    worth = values(none, 1.0)
    assert worth.plain == 0
    assert max(worth.drafting, worth.lead) == -np.inf
    assert worth.onward == 0


def test_a_block_alongside_plain_decoding() -> None:
    """By turns: a row with a block alongside (1.1 s), then its draft, two accepted: 4 tokens."""
    steady = found(estimates(block=[0, 0, 0], carried=[0, 1, 2], lead=0.1), width=2)
    assert steady.plan.strategy is Strategy.FUSED
    assert steady.rate == pytest.approx(4 / 2.1, rel=2e-3)


def test_blocks_that_always_come_true() -> None:
    """Nine cycles of ten leave a block for the next one. From a miss to the next: a row with a
    block alongside, then on average ten cycles of three tokens, each with 0.2 s of blocks.
    """
    hits = {Guess.LAST: 0.0, Guess.NEXT: 0.9}
    e = estimates(block=[0, 0, 0], carried=[0, 1, 2], lead=0.2, hits=hits, carrying=0.2)
    steady = found(e, blocks=2, width=2)
    assert (steady.plan.strategy, steady.plan.blocks, steady.plan.width) == (Strategy.FUSED, 2, 2)
    assert steady.rate == pytest.approx((1 + 30) / (1.2 + 10 * 1.2), rel=5e-3)


def test_no_block_rides_with_a_tree() -> None:
    """Blocks are worth something to a chain of two only, not to a tree of two that is one deep; and
    trees that are chosen draft by draft are trees, whatever their size."""
    hits = {Guess.LAST: 0.0, Guess.NEXT: 0.5}
    e = estimates(block=[0, 1, 2], carried=[0, 1, 2], lead=0.2, hits=hits, carrying=0.2)
    chain = values(e, 1.0)
    assert chain.onward > 0
    assert (chain.nodes, chain.branches) == (2, False)
    alone = chain.drafting - chain.onward
    tree = values(replace(e, passes={BLOCK: drafting([0, 1, 2], widths=[2, 1])}), 1.0)
    assert (tree.nodes, tree.branches) == (2, True)
    assert tree.drafting == pytest.approx(alone)
    suited = values(replace(e, trees={BLOCK: np.array([1, 2 + 1.01 * chain.onward])}), 1.0)
    assert (suited.nodes, suited.width, suited.branches) == (2, 2, True)
    assert suited.drafting == pytest.approx(alone + 1.01 * chain.onward)
    worse = values(replace(e, trees={BLOCK: np.array([1, 2 + 0.99 * chain.onward])}), 1.0)
    assert (worse.branches, worse.drafting) == (False, chain.drafting)
    assert found(replace(e, trees={BLOCK: np.array([1, 4.0])})).plan == Plan(
        Strategy.TWO_PASS, 2, tree=2
    )
    assert found(e).plan.strategy is Strategy.FUSED


def test_a_carried_draft_may_be_worth_more_as_a_tree() -> None:
    """But then no other follows it. Blocks come true half of the time and take 0.2 s at a token per
    second: as chains they are worth 2 and what comes next; as trees 4, or 3.5.
    """
    hits = {Guess.LAST: 0.0, Guess.NEXT: 0.5}
    e = estimates(block=[0, 0, 0], carried=[0, 1, 2], lead=0.2, hits=hits, carrying=0.2)
    chain = values(e, 1.0)
    assert chain.onward == pytest.approx((0.5 * 2 - 0.2) / (1 - 0.5))
    assert chain.gain[Guess.NEXT] == pytest.approx(2 + chain.onward)
    tree = values(replace(e, trees={NEXT: np.array([1, 4.0])}), 1.0)
    assert tree.gain[Guess.NEXT] == pytest.approx(4)
    assert tree.onward == pytest.approx(0.5 * 4 - 0.2)
    assert tree.gain[Guess.LAST] == pytest.approx(2 + tree.onward), "nothing is known of its trees"
    poor = values(replace(e, trees={NEXT: np.array([1, 3.5])}), 1.0)
    assert poor.gain == chain.gain
    assert poor.onward == chain.onward


def test_a_gain_is_what_a_draft_pass_would_have_taken() -> None:
    e = estimates(block=[0, 1, 2, 3], carried=[0, 1, 2, 3])
    worth = values(e, 2.0)
    assert worth.drafting == pytest.approx(0.0)
    assert worth.gain[Guess.NEXT] == pytest.approx(2.0), "a second at two tokens per second"
    assert worth.plain == pytest.approx(-1.0)


def test_rows_of_carried_blocks_are_weighed_by_hits() -> None:
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


def test_what_was_carried_is_remembered() -> None:
    carrying = Carrying(4.0, 2.0, 1.0, {Guess.LAST: 0.5, Guess.NEXT: 0.5})
    guesses = (Hypothesis(Guess.LAST, 1, 5, 0.5), Hypothesis(Guess.NEXT, 1, 9, 0.2))
    carrying.observe(Cycle(0, (5, 6), 1, (5, 9), guesses=guesses), 3.0)
    assert carrying.hits[Guess.NEXT] == pytest.approx(0.5 + NEWEST * 0.5), "the better one counts"
    assert carrying.hits[Guess.LAST] == pytest.approx(0.5 - NEWEST * 0.5)
    carrying.observe(Cycle(0, (5, 6), 1, (5, 8), guesses=guesses), 3.0)
    assert carrying.hits[Guess.LAST] > 0.5 - NEWEST * 0.5
    assert carrying.seconds == pytest.approx(1.0 + 2 * NEWEST * 2.0, rel=0.02)
