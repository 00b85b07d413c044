"""Which of a pass's outputs belong to which segment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import Logits

Taps = NDArray[np.float32]


class Outputs(NamedTuple):
    """What a pass has computed, in memory that the next one may overwrite.

    logits: [wanted rows, n_vocab]. taps: [rows, n_embd] each, of the layers asked for.
    """

    logits: Logits
    taps: Mapping[int, Taps]


class Gathered:
    """Logits and taps of segments, of which some run in several passes."""

    def __init__(self, *, with_taps: bool) -> None:
        self._with_taps = with_taps
        self._parts: dict[int, list[tuple[Logits, Taps | None]]] = {}

    def add(
        self, pieces: Sequence[Piece], outputs: Outputs
    ) -> Iterator[tuple[int, Logits, Taps | None]]:
        """Of the segments whose last rows have run in this pass: number, logits of the wanted rows,
        and taps [taps, rows, n_embd] (a copy). Logits may lie in the pass's memory."""
        row = wanted = 0
        for piece in pieces:
            asked = len(piece.wanted)
            logits, taps = outputs.logits[wanted : wanted + asked], None
            if self._with_taps and piece.segment.taps:
                rows = slice(row, row + piece.count)
                taps = np.stack([outputs.taps[tap][rows] for tap in piece.segment.taps])
            row, wanted = row + piece.count, wanted + asked
            if piece.first + piece.count == len(piece.segment):
                earlier = self._parts.pop(piece.index, [])
                yield piece.index, *_joined([*earlier, (logits, taps)])
            else:
                self._parts.setdefault(piece.index, []).append((logits.copy(), taps))


def _joined(parts: list[tuple[Logits, Taps | None]]) -> tuple[Logits, Taps | None]:
    """The parts of a segment as one; nothing is copied where only the last has logits."""
    if len(parts) == 1:
        return parts[0]
    logits = [part for part, _ in parts if len(part)] or [parts[0][0]]
    taps = [part for _, part in parts if part is not None]
    return (
        logits[0] if len(logits) == 1 else np.concatenate(logits),
        np.concatenate(taps, axis=1) if taps else None,
    )
