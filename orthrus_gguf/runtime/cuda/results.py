"""Which of a pass's results belong to which segment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.runtime.cuda.arrange import Arrangement
from orthrus_gguf.runtime.cuda.draws import choices
from orthrus_gguf.runtime.protocol import Choices, Logits, Segment
from orthrus_gguf.sampling import Choice


class Gathered:
    """Results of segments, of which some run in several passes; parts come in order."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._choices: list[list[Choice | None]] = [[] for _ in segments]
        self._taps: list[list[NDArray[np.float32]]] = [[] for _ in segments]
        self._logits: list[list[Logits]] = [[] for _ in segments]

    def add(self, arranged: Arrangement, found: NDArray[np.int32], n_embd: int) -> None:
        """Results of a pass that draws, as `Table.results` holds them; they are copied."""
        shape = arranged.shape
        size = shape.wanted * shape.columns
        rows = found[:size].reshape(shape.wanted, shape.columns)
        taps = found[size:].view(np.float32).reshape(len(shape.taps), shape.rows, n_embd)
        top = 0 if shape.kind is None else shape.kind.top
        first = 0
        for placed in arranged.placed:
            index, segment = placed.piece.index, placed.piece.segment
            count = len(placed.wanted)
            if count and segment.draw is not None:
                part = rows[first : first + count]
                self._choices[index] += choices(part, segment.draw, top)
            first += count
            if segment.taps:
                planes = [shape.taps.index(tap) for tap in segment.taps]
                own = placed.rows(sorted(placed.order))
                self._taps[index].append(taps[planes][:, own])

    def add_logits(self, arranged: Arrangement, found: Logits) -> None:
        """Logits of the wanted rows of a pass."""
        first = 0
        for placed in arranged.placed:
            count = len(placed.wanted)
            self._logits[placed.piece.index].append(found[first : first + count])
            first += count

    def choices(self) -> list[Choices]:
        """Of all segments."""
        return [
            Choices(tuple(rows), np.concatenate(taps, axis=1) if taps else None)
            for rows, taps in zip(self._choices, self._taps, strict=True)
        ]

    def logits(self, n_vocab: int) -> list[Logits]:
        """Of all segments."""
        empty = np.empty((0, n_vocab), np.float32)
        return [
            parts[0] if len(parts) == 1 else np.concatenate([empty, *parts])
            for parts in self._logits
        ]
