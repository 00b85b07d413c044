"""What a cycle is to do, and what it did: strategies, plans, and the policies that follow them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol, runtime_checkable

from orthrus_gguf.drafting.draft import (
    NO_DRAFT,
    Draft,
    Guess,
    Hypothesis,
    Source,
    Tree,
    best_first,
    hypotheses,
)
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import Model


class Strategy(Enum):
    """How a cycle finds its tokens."""

    AR = "ar"
    TWO_PASS = "two-pass"
    FUSED = "fused"


@dataclass(frozen=True)
class Plan:
    """A strategy and its shape.

    width: the most draft tokens verified per cycle. blocks: the most blocks that ride in a verify
    pass (fused). tail: also use what a refused draft said further on. lookup: also use what
    followed earlier occurrences of the last tokens. cut: a draft ends where the product of its
    confidences falls below this. tree: draft tokens of a tree of a draft's first and second choices
    (two-pass), which is then at most `width` deep; 0 verifies chains.
    """

    strategy: Strategy
    width: int
    blocks: int = 0
    tail: bool = False
    lookup: bool = False
    cut: float = 0.0
    tree: int = 0


@dataclass(frozen=True)
class Pass:
    """One forward pass of a cycle: its rows by view, the context it saw, how long it took."""

    ar_rows: int
    diffusion_rows: int
    context: int
    seconds: float


@dataclass(frozen=True)
class Cycle:
    """One committed step.

    start: position of the anchor it started from.
    drafts: verified tokens for the positions from start + 1 on (none in plain AR). Of a tree, the
        path that was accepted and then its likeliest continuation: the branch that was taken,
        without those that were not (which the rows of its pass tell).
    accepted: how many of them, from the first on, the AR view confirmed.
    tokens: what was committed: the accepted drafts, then the AR view's own next token.
    draft: where the drafts came from, and the drafter's confidence; it may be longer than what was
        verified. passes: what it took. guesses: what the blocks of its verify pass bet on.
    seconds: of the whole cycle, what the host did between passes included.
    """

    start: int
    drafts: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]
    draft: Draft = NO_DRAFT
    passes: tuple[Pass, ...] = ()
    guesses: tuple[Hypothesis, ...] = ()
    seconds: float = 0.0

    @property
    def source(self) -> Source | None:
        """Where the drafts came from; None when there were none."""
        return self.draft.source if self.drafts else None


class Policy(Protocol):
    """Decides what a cycle does. `room` is the largest number of draft tokens of use."""

    @property
    def lookup(self) -> bool:
        """Whether continuations of earlier occurrences are to be looked up."""
        ...

    def choose(self, offers: Sequence[Draft], room: int, context: int) -> Draft | int:
        """A draft among those that cost nothing, NO_DRAFT, or the rows of a draft pass (>= 1)."""
        ...

    def shape(
        self, draft: Draft, anchor: int, room: int, context: int
    ) -> tuple[int | Tree, Sequence[Hypothesis]]:
        """How many tokens of the draft to verify, and the blocks that ride along.

        Or a tree of tokens to verify, with which no block may ride.
        """
        ...

    def observe(self, cycle: Cycle) -> None:
        """Learn from a finished cycle."""
        ...


@runtime_checkable
class SteadyPolicy(Policy, Protocol):
    """A policy that can also plan cycles before it has seen the ones just before them."""

    def steady(self, context: int) -> Plan:
        """The plan for a cycle at about this context, as things stand."""
        ...


def plan_for(
    model: Model, strategy: Strategy, width: int | None, *, blocks: int | None = None
) -> Plan:
    """A validated plan. The default width is the official one, block size - 1.

    blocks: of the fused strategy; default FUSED_BLOCKS. Raises OrthrusError when the model has no
    diffusion heads or the width does not fit a block.
    """
    if strategy is Strategy.AR:
        return Plan(strategy, 0)
    block = model.config.block_size
    if not model.config.has_heads or block is None:
        raise OrthrusError(
            f"strategy {strategy.value}: {model.config.name} has no diffusion heads; use"
            " --strategy ar, or name a heads file with --heads"
        )
    if width is not None and not 1 <= width <= block:
        raise OrthrusError(f"--draft-width {width}: must lie in 1..{block}, the model's block size")
    width = block - 1 if width is None else width
    if strategy is Strategy.TWO_PASS:
        return Plan(strategy, width)
    return Plan(strategy, width, FUSED_BLOCKS if blocks is None else blocks)


#: Blocks that a fused pass carries unless the caller says otherwise.
FUSED_BLOCKS = 3

#: Most tokens of a lookup that are verified at once.
MAX_LOOKUP = 32

#: A stale tail is preferred to a draft pass if its first token is this sure. (A carried draft
#: always is: on the demo model, drafting again after a doubtful one costs 13 % of the tokens per
#: forward.)
SURE = 0.3

#: What a draft under guess A is worth beside one under guess B: its block spends a row on a token
#: that is known by then, and may have been written for another one.
WORTH_OF_LAST = 0.8


class FixedPolicy:
    """Does what a plan says, cycle after cycle."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lookup = plan.lookup
        self._tail_failed = False

    def choose(self, offers: Sequence[Draft], room: int, context: int) -> Draft | int:
        plan = self.plan
        usable = [offer for offer in offers if self._usable(offer)]
        if usable and room > 0:
            return max(
                usable, key=lambda o: expected([prior_acceptance(c) for c in o.confidence[:room]])
            )
        if plan.strategy is Strategy.AR or room == 0:
            return NO_DRAFT
        return min(plan.width, room) + 1

    def _usable(self, offer: Draft) -> bool:
        if offer.source in (Source.LOOKUP, Source.LAST, Source.NEXT):
            return True
        return self.plan.tail and offer.confidence[0] >= SURE and not self._tail_failed

    def shape(
        self, draft: Draft, anchor: int, room: int, context: int
    ) -> tuple[int | Tree, Sequence[Hypothesis]]:
        plan = self.plan
        most = MAX_LOOKUP if plan.strategy is Strategy.AR else plan.width
        width = cut_width(draft.confidence[: min(most, room)], plan.cut)
        accept = [prior_acceptance(value) for value in draft.confidence]
        if plan.tree:
            return best_first(draft, accept[:width], plan.tree), ()
        if plan.strategy is not Strategy.FUSED:
            return width, ()
        guesses = [
            replace(guess, rows=rows)
            for guess in hypotheses(draft, width, accept, anchor)
            if (rows := block_rows(guess, plan.width, room)) > 0
        ]
        guesses.sort(key=worth, reverse=True)
        return width, guesses[: plan.blocks]

    def observe(self, cycle: Cycle) -> None:
        """A tail that was refused at once leaves another tail: draft anew before trying that."""
        self._tail_failed = cycle.source is Source.TAIL and not cycle.accepted


def prior_acceptance(confidence: float) -> float:
    """Acceptance that a drafter's confidence suggests before anything is known about it.

    The diffusion view is less sure than it should be: on the demo model, tokens it gives 15 % are
    accepted in half of the cases, those it gives 50 % in nine of ten.
    """
    return math.sqrt(confidence)


def worth(guess: Hypothesis) -> float:
    """How much good the block of this guess may do, relative to the others of its pass."""
    return guess.probability * (WORTH_OF_LAST if guess.guess is Guess.LAST else 1.0)


def block_rows(guess: Hypothesis, width: int, room: int) -> int:
    """Rows of a block that drafts `width` tokens, and one to go on with, for the next cycle.

    room: draft tokens that the current cycle could use. 0 if the next one could use none.
    """
    tokens = min(width, room - guess.accepted - 1)
    return tokens + 1 + (guess.guess is Guess.LAST) if tokens > 0 else 0


def cut_width(confidence: Sequence[float], cut: float) -> int:
    """Tokens of a draft until the product of their confidences falls below `cut`."""
    product = 1.0
    for width, value in enumerate(confidence):
        product *= value
        if product < cut:
            return width
    return len(confidence)


def expected(accept: Sequence[float]) -> float:
    """Draft tokens that will be accepted, given the probability of each if those before are."""
    total, product = 0.0, 1.0
    for value in accept:
        product *= value
        total += product
    return total
