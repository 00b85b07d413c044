"""What a drafter is: it proposes drafts, or passes that would bring one, and learns what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.protocol import Choices, Segment, View


@dataclass(frozen=True)
class DraftPass:
    """A pass that would bring a draft.

    most: the most tokens it can bring. rows: that it takes to bring so many, all of one view.
    segments: what to run, for so many. read: the draft, from the choices of those segments.
    width: tokens wanted, set by the policy that orders it.
    """

    source: Source
    most: int
    rows: Callable[[int], int]
    segments: Callable[[TokenSequence, int], list[Segment]]
    read: Callable[[Sequence[Choices]], Draft]
    width: int = 0
    view: View = View.DIFFUSION

    def ordered(self, width: int) -> DraftPass:
        """The pass for `width` tokens, or as many as it can bring."""
        return DraftPass(
            *(self.source, self.most, self.rows, self.segments, self.read),
            width=min(width, self.most),
            view=self.view,
        )


@dataclass(frozen=True)
class Results:
    """What a pass left for drafters.

    start: position of the first row that it committed; what the cache held before a prompt's first
        pass was never told. taps: float32 [taps, rows, n_embd] at the committed rows, of the layers
        that the drafter named, in its order.
    blocks: choices of the blocks that rode along, in the order of `Cycle.guesses`.
    """

    start: int = 0
    taps: NDArray[np.float32] | None = None
    blocks: tuple[Choices, ...] = ()


class Drafter(Protocol):
    """One way of drafting, for one sequence. A file of this folder each."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose input it reads at committed rows (`Segment.taps`); most read none."""
        ...

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft | DraftPass]:
        """Drafts that are at hand, and passes that would bring one; mostly one or nothing.

        tokens: committed, the anchor last. room: the most draft tokens of use, at least 1.
        """
        ...

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        """Learn what a cycle committed, or (None) what a prompt pass did. tokens: all of them."""
        ...
