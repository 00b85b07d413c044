"""Policies decide what the cycles of a sequence do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orthrus_gguf.drafting.cycle import Cycle, Hypothesis
from orthrus_gguf.drafting.draft import Draft
from orthrus_gguf.drafting.drafter import Drafter, DraftPass
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tree import Tree


class Policy(Protocol):
    """Decides what the cycles of one sequence do."""

    def drafters(self, sequence: TokenSequence) -> Sequence[Drafter]:
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
