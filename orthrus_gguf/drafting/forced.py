"""Forced tokens: where a constraint (a grammar) leaves no choice, what must come is a draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.drafter import Results

#: Not quite certain: the model may spell the same text in other tokens.
FORCED = Source("forced", "forced by the grammar", "#56B4E9", 0.95)


@runtime_checkable
class Forcing(Protocol):
    """A constraint that knows what must come."""

    def forced(self, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens that must follow the committed ones, as far as one can tell."""
        ...


class ForcedDrafter:
    """Asks a constraint. It comes with the constraint, not with a plan, so no registry knows it."""

    taps = ()

    def __init__(self, constraint: Forcing) -> None:
        self._constraint = constraint

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft]:
        """What must come, if anything must."""
        found = tuple(self._constraint.forced(tokens))[:room]
        return (Draft(FORCED, found, (FORCED.likely,) * len(found)),) if found else ()

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        """The constraint is told by whoever asks it."""
