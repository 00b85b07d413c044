"""The diffusion block: a pass in which the diffusion view drafts after the anchor."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source, read_draft
from orthrus_gguf.drafting.drafter import DraftPass, Results
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.runtime.protocol import Choices, Segment

BLOCK = Source("block", "draft pass", "#0072B2", 0.7)


class BlockDrafter:
    """Offers a draft pass whenever there is room."""

    taps = ()

    def __init__(self, sequence: TokenSequence) -> None:
        size = sequence.config.block_size
        if size is None:
            raise ValueError("the model has no diffusion heads")
        self._size = size
        self._pass = DraftPass(BLOCK, self._size, self._rows, self._segments, _read)

    def propose(self, tokens: Sequence[int], room: int) -> tuple[DraftPass]:
        return (self._pass,)

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        """Nothing to learn."""

    def _rows(self, width: int) -> int:
        """The official loop drafts a token more than it verifies; so do we, up to a block."""
        return min(width + 1, self._size)

    def _segments(self, sequence: TokenSequence, width: int) -> list[Segment]:
        return [sequence.block_segment(self._rows(width))]


def _read(choices: Sequence[Choices]) -> Draft:
    return read_draft(BLOCK, choices[0].rows)
