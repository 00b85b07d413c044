"""What a cycle is to do, and what it did: cycles, and the policies that decide about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from orthrus_gguf.drafting.draft import NO_DRAFT, Draft, Drafter, DraftPass, Source
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.model.config import ModelConfig

if TYPE_CHECKING:
    from orthrus_gguf.drafting.carried_blocks import Hypothesis


@dataclass(frozen=True)
class Pass:
    """One forward pass of a cycle: its rows by view, the context it saw, how long it took.

    company: rows of other sequences in the same pass.
    """

    ar_rows: int
    diffusion_rows: int
    context: int
    seconds: float
    company: int = 0


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
        """How many of the draft's own first choices were accepted: of a chain, all that were; in a
        tree, a second choice may have taken over."""
        first = self.draft.tokens[: self.accepted]
        pairs = enumerate(zip(first, self.tokens, strict=False))
        return next((i for i, (ours, theirs) in pairs if ours != theirs), len(first))


class Policy(Protocol):
    """Decides what the cycles of one sequence do."""

    def drafters(self, config: ModelConfig) -> Sequence[Drafter]:
        """New drafters for a sequence that is about to be decoded."""
        ...

    def choose(
        self, drafts: Sequence[Draft], passes: Sequence[DraftPass], room: int, context: int
    ) -> Draft | DraftPass:
        """One of the drafts at hand, NO_DRAFT, or a pass to run first, with its `width` set.

        room: the most draft tokens of use; 0 wherever a draft can be of none.
        """
        ...

    def shape(
        self, draft: Draft, anchor: int, room: int, context: int
    ) -> tuple[Tree, Sequence[Hypothesis]]:
        """What to verify of the draft, and the blocks that ride along (none beside branches)."""
        ...

    def observe(self, cycle: Cycle) -> None:
        """Learn from a finished cycle."""
        ...
