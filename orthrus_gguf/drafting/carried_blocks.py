"""Carried blocks: drafted together with their verification, on guesses at its outcome.

A block may ride in a verify pass and draft the next cycle. What it is anchored at is a guess: one
that comes true has drafted in the place where an ordinary draft pass would have, and the others are
thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from orthrus_gguf.drafting.block import BLOCK
from orthrus_gguf.drafting.cycle import Cycle, Guess, Hypothesis
from orthrus_gguf.drafting.draft import Draft, Source, read_draft
from orthrus_gguf.drafting.drafter import Results
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.runtime.protocol import Choices

LAST = Source("carried A", "carried, guess A", "#E69F00", 0.6)
NEXT = Source("carried B", "carried, guess B", "#009E73", 0.7)


SOURCES = {Guess.LAST: LAST, Guess.NEXT: NEXT}


def resolve(guess: Hypothesis, cycle: Cycle, choices: Choices) -> Draft | None:
    """The draft that the block of a guess holds for the next cycle; None if it was wrong."""
    if not guess.is_true(cycle):
        return None
    if guess.guess is Guess.NEXT:
        return read_draft(NEXT, choices.rows)
    # Row 0 predicts the anchor's own position. If it would have named another token, the rows
    # behind it are less to be trusted, and the first of them says how much less.
    named, anchor = choices[0], cycle.tokens[-1]
    draft = read_draft(LAST, choices.rows[1:])
    if named is None or not draft.tokens:
        return None
    if named.token == anchor:
        return draft
    doubt = named.second_probability if named.second == anchor else 1 - named.probability
    return replace(draft, confidence=(draft.confidence[0] * doubt, *draft.confidence[1:]))


def hypotheses(
    draft: Draft, width: int, accept: Sequence[float], anchor: int
) -> Iterator[Hypothesis]:
    """Every guess at the outcome of verifying the first `width` tokens of `draft`.

    accept: per draft token, the probability that it is accepted if those before it are. anchor:
    the token before the draft. Guess A of "none accepted" is a block at that anchor, and left out
    where the draft came from one.
    """
    survival, before = 1.0, anchor
    seconds = draft.second_shares(width)
    last, next_ = Guess.LAST, Guess.NEXT  # members of enums are slow to look up
    at_anchor = not draft.tokens or draft.source not in (BLOCK, NEXT)
    for accepted, token in enumerate(draft.tokens[:width]):
        ends, survival = survival * (1 - accept[accepted]), survival * accept[accepted]
        if accepted or at_anchor:
            yield Hypothesis(last, accepted, before, ends)
        if draft.second:
            yield Hypothesis(next_, accepted, draft.second[accepted][0], ends * seconds[accepted])
        before = token
    if width or at_anchor:
        yield Hypothesis(last, width, before, survival)
    if width < len(draft.tokens):
        yield Hypothesis(next_, width, draft.tokens[width], survival * accept[width])


class CarriedBlocks:
    """Keeps what the blocks of the last cycle drafted. Which blocks ride is the policy's choice."""

    taps = ()

    def __init__(self, sequence: TokenSequence) -> None:
        self._drafts: list[Draft] = []

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft]:
        return self._drafts

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        guesses = () if cycle is None else cycle.guesses
        found = [
            resolve(guess, cycle, choices)
            for guess, choices in zip(guesses, results.blocks, strict=True)
            if cycle is not None
        ]
        self._drafts = [draft for draft in found if draft is not None and len(draft)]
