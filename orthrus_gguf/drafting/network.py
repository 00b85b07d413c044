"""What drafters with a network of their own beside the model have in common."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source, read_draft
from orthrus_gguf.drafting.drafter import DraftPass, Results
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.runtime.protocol import Choices, Segment, View


class NetworkDrafter:
    """Offers a draft pass wherever its network was told of the whole text. The network runs beside
    the model (`runtime/beside.py`)."""

    def __init__(self, sequence: TokenSequence, source: Source) -> None:
        if sequence.draft_cache is None:
            raise ValueError("there is no drafter beside the model")
        self._cache, self._source = sequence.draft_cache, source
        self.taps, beside = self._cache.taps, self._cache.beside
        self._pass = DraftPass(
            source, beside.most, beside.rows, _segments, self._read, view=View.DRAFTER
        )

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[DraftPass]:
        return (self._pass,) if self._cache.length == len(tokens) - 1 else ()

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        if results.taps is not None:
            self._cache.follow(tokens, results.start, results.taps)

    def _read(self, choices: Sequence[Choices]) -> Draft:
        return read_draft(self._source, choices[0].rows)


def _segments(sequence: TokenSequence, width: int) -> list[Segment]:
    return [sequence.drafter_segment(width)]
