"""Drafts, guesses at the outcome of their verification, and what becomes of both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from toy_model import VOCAB, ToyModel, ar_logits, one_hot

from orthrus_gguf.drafting.block import BLOCK
from orthrus_gguf.drafting.carried_blocks import LAST, NEXT, CarriedBlocks, hypotheses, resolve
from orthrus_gguf.drafting.cycle import Cycle, Guess, Hypothesis
from orthrus_gguf.drafting.draft import NONE, Draft, Source, read_draft
from orthrus_gguf.drafting.drafter import Results
from orthrus_gguf.drafting.lookup import LOOKUP
from orthrus_gguf.drafting.tail import TAIL, TailDrafter
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.runtime.drawing import draw_choices
from orthrus_gguf.runtime.protocol import Choices, Draw, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

GREEDY = SamplingSettings(temperature=0)
DRAFT = Draft(BLOCK, (5, 6, 7), (0.9, 0.5, 0.8), ((15, 0.05), (16, 0.25), (17, 0.1)))


def choices(
    logits: np.ndarray,
    prefix: Sequence[int] = (1,),
    ahead: tuple[int, ...] = (),
    sampling: SamplingSettings = GREEDY,
) -> Choices:
    """What a pass says of a block whose anchor is the last token of `prefix + ahead`."""
    start = len(prefix) + len(ahead) - 1
    draw = Draw(Sampler(sampling), prefix, ahead, detail=True)
    cache = ToyModel().new_cache(100)
    anchor = [*prefix, *ahead][-1]
    segment = diffusion_segment(cache, anchor, 63, len(logits), start, draw=draw)
    return Choices(draw_choices(segment, logits))


def outcome(accepted: int, committed: Sequence[int], draft: Draft = DRAFT) -> Cycle:
    return Cycle(0, draft.tokens, accepted, tuple(committed), draft)


def test_a_draft_is_read_row_by_row() -> None:
    logits = np.stack([ar_logits([i]) for i in range(4)])
    draft = read_draft(BLOCK, choices(logits).rows)
    assert draft.source == BLOCK
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
    assert len(read_draft(BLOCK, choices(logits).rows)) == 2


@pytest.mark.parametrize("ahead", [(), (9,), (9, 2, 9)])
def test_drafts_are_drawn_as_verification_will_draw(ahead: tuple[int, ...]) -> None:
    """Behind tokens that are only taken to follow, too: same noise, same penalties."""
    sampling = SamplingSettings(temperature=1.3, seed=4, repeat_penalty=1.4)
    logits = np.stack([ar_logits([i]) for i in range(8)])
    prefix = [3, 1, *ahead]
    draft = read_draft(NEXT, choices(logits, (3, 1), ahead, sampling).rows)
    assert len(draft) == 8
    for row, token in zip(logits, draft.tokens, strict=True):
        choice = Sampler(sampling).draw(row, prefix)
        assert choice is not None
        assert token == choice.token
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


@pytest.mark.parametrize("source", [BLOCK, NEXT, LAST, TAIL, LOOKUP], ids=lambda s: s.name)
def test_a_block_at_the_anchor_is_only_carried_if_there_was_none(source: Source) -> None:
    draft = Draft(source, (5,), (0.5,))
    found = [g for g in hypotheses(draft, 1, [0.5], 1) if g.accepted == 0]
    assert [(g.guess, g.anchor) for g in found] == (
        [] if source in (BLOCK, NEXT) else [(Guess.LAST, 1)]
    )


def test_plain_decoding_may_carry_a_block_at_its_anchor() -> None:
    assert list(hypotheses(Draft(NONE, (), ()), 0, [], 1)) == [Hypothesis(Guess.LAST, 0, 1, 1.0)]


@pytest.mark.parametrize(
    ("accepted", "committed", "left", "source"),
    [
        (0, [9], (6, 7), TAIL),  # refused at once: the tail is stale
        (1, [5, 9], (7,), TAIL),
        (1, [5, 6], (7,), BLOCK),  # one verified, and the draft went on to be right
        (2, [5, 6, 9], (), None),
        (3, [5, 6, 7, 9], (), None),
    ],
)
def test_what_is_left_of_a_draft(
    accepted: int, committed: list[int], left: tuple[int, ...], source: Source | None
) -> None:
    drafter = TailDrafter(ToyModel().sequence([1], GREEDY))
    drafter.committed([1, *committed], outcome(accepted, committed), Results())
    proposed = drafter.propose([1, *committed], 9)
    if source is None:
        assert not proposed
        return
    (rest,) = proposed
    assert (rest.tokens, rest.source) == (left, source)
    skipped = len(DRAFT) - len(left)
    assert rest.confidence == DRAFT.confidence[skipped:]
    assert rest.second == DRAFT.second[skipped:]
    assert drafter.propose([1, *committed], 9) == proposed, "asking changes nothing"
    drafter.committed([1], Cycle(0, (), 0, (8,)), Results())
    assert not drafter.propose([1, 8], 9), "a cycle without a draft leaves nothing"
    drafter.committed([1, *committed], outcome(accepted, committed), Results())
    drafter.committed([1, 2, 3], None, Results())
    assert not drafter.propose([1, 2, 3], 9), "nor does a prompt"


def test_guess_b_serves_only_the_anchor_it_was_made_for() -> None:
    guess = Hypothesis(Guess.NEXT, 1, 16, 0.2, 2)
    block = choices(np.stack([one_hot(30), one_hot(31)]))
    assert resolve(guess, outcome(0, [16]), block) is None
    assert resolve(guess, outcome(1, [5, 17]), block) is None
    draft = resolve(guess, outcome(1, [5, 16]), block)
    assert draft is not None
    assert (draft.source, draft.tokens) == (NEXT, (30, 31))


def test_guess_a_drops_its_row_for_the_anchor_and_doubts_what_missed_it() -> None:
    guess = Hypothesis(Guess.LAST, 1, 5, 0.4, 3)
    block = choices(np.stack([one_hot(16, 5), one_hot(30, 5), one_hot(31, 5)]))
    named = resolve(guess, outcome(1, [5, 16]), block)
    missed = resolve(guess, outcome(1, [5, 40]), block)
    assert named is not None
    assert missed is not None
    assert named.source == missed.source == LAST
    assert named.tokens == missed.tokens == (30, 31)
    sure = np.exp(5) / (np.exp(5) + VOCAB - 1)
    assert named.confidence[0] == pytest.approx(sure, rel=1e-5)
    assert missed.confidence[0] == pytest.approx(sure * (1 - sure), rel=1e-4)
    assert named.confidence[1] == missed.confidence[1]


def test_guess_a_knows_how_likely_its_second_choice_was() -> None:
    """Row 0 named another token, but gave the anchor as its second choice."""
    guess = Hypothesis(Guess.LAST, 1, 5, 0.4, 2)
    first = np.where(np.arange(VOCAB) == 40, 4, one_hot(16, 5)).astype(np.float32)
    block = choices(np.stack([first, one_hot(30, 5)]))
    found = resolve(guess, outcome(1, [5, 40]), block)
    assert found is not None
    weights = np.exp(first.astype(np.float64))
    sure = np.exp(5) / (np.exp(5) + VOCAB - 1)
    assert found.confidence[0] == pytest.approx(sure * weights[40] / weights.sum(), rel=1e-4)


def test_a_broken_row_of_a_guess_ends_it() -> None:
    nan = np.full(VOCAB, np.nan, np.float32)
    last, following = Hypothesis(Guess.LAST, 1, 5, 0.4, 2), Hypothesis(Guess.NEXT, 1, 16, 0.4, 2)
    cycle = outcome(1, [5, 16])
    assert resolve(last, cycle, choices(np.stack([nan, one_hot(3)]))) is None
    assert resolve(last, cycle, choices(np.stack([one_hot(3), nan]))) is None
    empty = resolve(following, cycle, choices(np.stack([nan, one_hot(3)])))
    assert empty is None or not len(empty)


def test_blocks_are_where_their_guesses_put_them() -> None:
    """Guess A behind the drafts it takes to be accepted, guess B behind its anchor too."""
    sequence = ToyModel().sequence([1, 2, 3], GREEDY)
    tree = Tree((5, 6, 7))
    for guess, place, anchor in ((Guess.LAST, 4, 6), (Guess.NEXT, 5, 16)):
        segment = Hypothesis(guess, 2, anchor, 0.1, 4).segment(sequence, tree)
        assert (segment.start, segment.tokens) == (place, (anchor, 63, 63, 63))
        assert segment.draw is not None
        assert [*segment.draw.history, *segment.draw.ahead] == [1, 2, 3, 5, 6, 16][: place + 1]


def test_carried_blocks_offer_what_came_true() -> None:
    drafter = CarriedBlocks(ToyModel().sequence([1], GREEDY))
    assert not drafter.propose([1], 9)
    guesses = (
        Hypothesis(Guess.LAST, 0, 1, 0.4, 2),
        Hypothesis(Guess.LAST, 1, 5, 0.4, 2),
        Hypothesis(Guess.NEXT, 1, 16, 0.1, 2),
        Hypothesis(Guess.NEXT, 1, 17, 0.1, 2),
    )
    blocks = tuple(choices(np.stack([one_hot(16), one_hot(40 + i)])) for i in range(4))
    cycle = Cycle(0, DRAFT.tokens, 1, (5, 16), DRAFT, guesses=guesses)
    drafter.committed([1, 5, 16], cycle, Results(blocks=blocks))
    proposed = drafter.propose([1, 5, 16], 9)
    assert [(d.source, d.tokens) for d in proposed] == [(LAST, (41,)), (NEXT, (16, 42))]
    drafter.committed([1, 5, 16, 2], Cycle(2, (), 0, (2,)), Results())
    assert not drafter.propose([1, 5, 16, 2], 9)
