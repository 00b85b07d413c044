"""A model that answers from a recording, and a clock that costs drive.

With them the real decode loop and the real controller run, so that a simulation has no rules of
its own. Only what counts is answered: AR rows whose prefix left the text, and blocks on guesses
that did not come true, are thrown away by the loop, so any answer will do for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.auto.costs import Costs
from orthrus_gguf.bench.simulation.recording import RecordedRows, Text
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.shapes import SHAPES
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.protocol import (
    OWN_VIEWS,
    Checkpoint,
    Choices,
    Logits,
    Segment,
    View,
    check_segments,
    depths,
)
from orthrus_gguf.sampling import Choice

#: The answer where any will do.
ANY = Choice(0, 0.0, 0, 0.0)


class VirtualClock:
    """Seconds that have passed by the costs of passes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ReplayCache:
    """Counts rows: a replay needs none of their contents."""

    def __init__(self, capacity: int) -> None:
        self._length, self._capacity = 0, capacity

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    def commit(self, rows: Sequence[int]) -> None:
        self._length += len(rows)

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        return Checkpoint(self._length if length is None else min(length, self._length))

    def restore(self, checkpoint: Checkpoint) -> None:
        self._length = checkpoint.length

    def fit(self, parents: Sequence[int]) -> int:
        return len(parents)

    def assume(self, rows: int) -> None:
        self._length += rows


class ReplayModel:
    """The `Model` protocol, from recorded texts.

    A pass takes what `costs` say. `text` is the one that is being replayed; without one, every
    answer is token 0 (enough to be timed).
    """

    def __init__(self, costs: Costs, clock: VirtualClock, block_size: int | None) -> None:
        """block_size: of the heads; None without."""
        # Of the shape only the block counts: how long passes take is the costs' business.
        self.config: ModelConfig = replace(SHAPES["qwen3-8b"], block_size=block_size)
        if block_size is None:
            self.config = replace(self.config, mask_token=None)
        self.description = "replay"
        self.text: Text | None = None
        self._costs, self._clock = costs, clock

    def close(self) -> None:
        """Nothing is held."""

    def new_cache(self, capacity: int) -> ReplayCache:
        return ReplayCache(capacity)

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        check_segments(segments)
        ar, diffusion = (sum(len(s) for s in segments if s.view is view) for view in OWN_VIEWS)
        self._clock.now += self._costs.seconds(ar, diffusion, segments[0].cache.length)
        return [
            Choices(self._answer(s)[s.wanted.start : s.wanted.stop], _nothing_to_see(s))
            for s in segments
        ]

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        raise ValueError("a recording holds choices, not logits")

    def _answer(self, segment: Segment) -> tuple[Choice | None, ...]:
        """One choice per row."""
        if self.text is None:
            return (ANY,) * len(segment)
        if segment.view is View.AR:
            parents = segment.parents
            ahead = range(len(segment)) if parents is None else depths(parents)
            rest = self.text.tokens[segment.start + 1 :]
            return tuple(Choice(rest[i]) if i < len(rest) else ANY for i in ahead)
        rows = len(segment)
        recorded = min(size for size in self.text.blocks if size >= rows)
        return _drafted(self.text, self.text.blocks[recorded], segment, rows)


class ReplayNetwork:
    """The `Network` protocol, from what a drafter's network drafted beside a `ReplayModel`."""

    taps = (0,)

    def __init__(
        self, model: ReplayModel, costs: Costs, clock: VirtualClock, beside: Beside
    ) -> None:
        self.config: ModelConfig = replace(SHAPES["qwen3-8b"], block_size=beside.block)
        self.beside = beside
        self._model, self._costs, self._clock = model, costs, clock

    def new_cache(self, capacity: int) -> ReplayCache:
        return ReplayCache(capacity)

    def inject(self, cache: ReplayCache, tokens: Sequence[int], taps: NDArray[np.float32]) -> None:
        cache.assume(taps.shape[1])

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """Costs are those of the longest draft; a shorter chain takes its share of them."""
        rows = max(len(segment) for segment in segments)
        self._clock.now += self._costs.drafter * rows / self.beside.rows(self.beside.most)
        text = self._model.text
        recorded = None if text is None else text.drafter
        return [Choices(_drafted(text, recorded, s, len(s.wanted))) for s in segments]

    def close(self) -> None:
        """Nothing is held."""


class ReplayWithDrafter(ModelWithDrafter):
    """Both of them."""

    def __init__(self, model: ReplayModel, network: ReplayNetwork) -> None:
        super().__init__(model, network)
        self._stock = model

    @property
    def text(self) -> Text | None:
        """See `ReplayModel`."""
        return self._stock.text

    @text.setter
    def text(self, text: Text) -> None:
        self._stock.text = text


Replayed = ReplayModel | ReplayWithDrafter


def _drafted(
    text: Text | None, recorded: RecordedRows | None, segment: Segment, rows: int
) -> tuple[Choice | None, ...]:
    """The first `rows` choices that were recorded of a block at that anchor."""
    anchor = segment.start - len(text.prompt) if text is not None else -1
    if recorded is None or not 0 <= anchor < len(recorded):
        return (ANY,) * rows
    return tuple(map(_choice, recorded[anchor, :rows].tolist()))


def _nothing_to_see(segment: Segment) -> NDArray[np.float32] | None:
    """Taps, where they are asked for: a recording holds none."""
    return np.zeros((len(segment.taps), len(segment), 1), np.float32) if segment.taps else None


def _choice(row: Sequence[float]) -> Choice | None:
    """A recorded row; None where the draft ended."""
    token, probability, second, second_probability = row
    if probability != probability:  # NaN
        return None
    return Choice(int(token), probability, int(second), second_probability)
