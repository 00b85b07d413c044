"""What a cycle did: its passes, its draft, and the guesses that its blocks bet on."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from orthrus_gguf.drafting.draft import NO_DRAFT, Draft, Source
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.protocol import Segment


@dataclass(frozen=True)
class Pass:
    """One forward pass of a cycle: its rows by view, the context it saw, how long it took.

    company: rows of other sequences in the same pass. drafter_rows: of a drafter's own network.
    """

    ar_rows: int
    diffusion_rows: int
    context: int
    seconds: float
    company: int = 0
    drafter_rows: int = 0


class Guess(Enum):
    """What a carried block is anchored at.

    LAST (A): the last accepted draft, so that its row 0 names the correction. NEXT (B): the next
    anchor itself, guessed.
    """

    LAST = "A"
    NEXT = "B"

    # Members are themselves only; Enum's own hash, of the name, is slow.
    __hash__ = object.__hash__


class Hypothesis(NamedTuple):
    """A block drafted on the guess that exactly `accepted` drafts will be accepted.

    anchor: the token of its first row. probability: that the guess comes true, as far as the draft
    can tell. rows: size of the block. (A tuple: a cycle weighs dozens, and a frozen dataclass takes
    four times as long to make.)
    """

    guess: Guess
    accepted: int
    anchor: int
    probability: float
    rows: int = 0

    def sized(self, rows: int) -> Hypothesis:
        """The guess with a block of so many rows."""
        return Hypothesis(self.guess, self.accepted, self.anchor, self.probability, rows)

    def segment(self, sequence: TokenSequence, tree: Tree) -> Segment:
        """Its block, behind the first drafts of the chain that the same pass verifies."""
        ahead = tree.tokens[: self.accepted]
        if self.guess is Guess.NEXT:
            ahead = (*ahead, self.anchor)
        return sequence.block_segment(self.rows, ahead)

    def is_true(self, cycle: Cycle) -> bool:
        """Whether the outcome was this one."""
        if cycle.accepted != self.accepted:
            return False
        return self.guess is Guess.LAST or self.anchor == cycle.tokens[-1]


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

    @property
    def agreed(self) -> int:
        """How many of the draft's own first choices, in a row, the AR view confirmed: of a chain,
        all that were accepted. In a tree a second choice may have taken over; or the first one may
        have been left out, and was right."""
        pairs = list(zip(self.draft.tokens[: len(self.drafts)], self.tokens, strict=False))
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
