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
from orthrus_gguf.bench.simulation.recording import COLUMNS, Text
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.shapes import QWEN3_SHAPES
from orthrus_gguf.runtime.protocol import Logits, Segment, View, check_segments, depths
from orthrus_gguf.sampling import Choice, Sampler, SamplingSettings


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

    def truncate(self, length: int) -> None:
        self._length = length

    def append(self, rows: int) -> None:
        self._length += rows

    def fit_tree(self, parents: Sequence[int]) -> int:
        return len(parents)

    def keep_path(self, rows: Sequence[int]) -> None:
        self._length += len(rows)


class ReplayModel:
    """The `Model` protocol, from recorded texts. What it calls logits are recorded choices
    [rows, COLUMNS], which `ReplaySampler` reads: exact, and small.

    A pass takes what `costs` say. `text` is the one that is being replayed; without one, every
    answer is token 0 (enough to be timed).
    """

    def __init__(self, costs: Costs, clock: VirtualClock, block_size: int) -> None:
        # Of the shape only the block counts: how long passes take is the costs' business.
        self.config: ModelConfig = replace(QWEN3_SHAPES["qwen3-8b"], block_size=block_size)
        self.description = "replay"
        self.text: Text | None = None
        self._costs, self._clock = costs, clock

    def close(self) -> None:
        """Nothing is held."""

    def new_cache(self, capacity: int) -> ReplayCache:
        return ReplayCache(capacity)

    def forward(self, segments: Sequence[Segment], cache: ReplayCache) -> list[Logits]:
        check_segments(segments, cache)
        context = cache.length
        ar, diffusion = (sum(len(s) for s in segments if s.view is view) for view in View)
        if segments[0].parents is None:
            cache.append(ar)
        self._clock.now += self._costs.seconds(ar, diffusion, context)
        return [self._answer(segment) for segment in segments]

    def _answer(self, segment: Segment) -> Logits:
        answer = np.zeros((len(segment), COLUMNS), np.float32)
        if self.text is None:
            return answer
        if segment.view is View.AR:
            parents = segment.parents
            ahead = range(len(segment)) if parents is None else depths(parents)
            rest = self.text.tokens[segment.start + 1 :]
            answer[:, 0] = [rest[i] if i < len(rest) else 0 for i in ahead]
            return answer
        anchor = segment.start - len(self.text.prompt)
        if not 0 <= anchor < len(self.text.output) - 1:
            return answer
        rows = len(segment)
        recorded = min(size for size in self.text.blocks if size >= rows)
        drafted: Logits = self.text.blocks[recorded][anchor, :rows]
        return drafted


class ReplaySampler(Sampler):
    """Reads recorded choices where a `Sampler` would draw them from logits."""

    def __init__(self) -> None:
        super().__init__(SamplingSettings(temperature=0))

    def sample(self, logits: NDArray[np.float32], prefix: Sequence[int]) -> int:
        return int(logits[0])

    def choose(self, logits: NDArray[np.float32], prefix: Sequence[int]) -> Choice | None:
        token, probability, second, second_probability = logits.tolist()
        if probability != probability:  # NaN: the draft ended here
            return None
        return Choice(int(token), probability, int(second), second_probability)
