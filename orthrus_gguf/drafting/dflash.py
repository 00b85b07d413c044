"""DFlash: a drafter with a network of its own, which reads what the model's layers read.

It drafts a whole block at once, as diffusion heads do, but for a model that has none (Chen et al.
2026, z-lab/dflash). The network runs beside the model (`runtime/beside.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source, read_draft
from orthrus_gguf.drafting.drafter import DraftPass, Results
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.runtime.protocol import Choices, Segment, View

#: likely: what z-lab's drafters have on maths and code, nearly the same at every position.
DFLASH = Source("dflash", "DFlash", "#56B4E9", 0.8)


class DFlashDrafter:
    """Offers a draft pass wherever its network was told of the whole text."""

    def __init__(self, sequence: TokenSequence) -> None:
        if sequence.draft_cache is None:
            raise ValueError("there is no drafter beside the model")
        self._cache = sequence.draft_cache
        self.taps = self._cache.taps
        most = self._cache.block_size - 1  # row 0 is the anchor
        self._pass = DraftPass(DFLASH, most, self._rows, self._segments, _read, view=View.DRAFTER)

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[DraftPass]:
        return (self._pass,) if self._cache.length == len(tokens) - 1 else ()

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        if results.taps is not None:
            self._cache.follow(tokens, results.start, results.taps)

    def _rows(self, width: int) -> int:
        return self._cache.block_size

    def _segments(self, sequence: TokenSequence, width: int) -> list[Segment]:
        return [sequence.drafter_segment(width)]


def _read(choices: Sequence[Choices]) -> Draft:
    return read_draft(DFLASH, choices[0].rows)
