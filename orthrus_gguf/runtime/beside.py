"""A drafter's own network beside a model: one `Model` of both.

The network reads what some layers of the model read (taps) at every committed row, makes keys and
values of it, and drafts in blocks or chains that see those. Its cache follows the text: it is told
what was committed, and goes back where the text does. Runtimes bring the network (`Network`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cache_layout import BATCH_ROWS
from orthrus_gguf.runtime.protocol import (
    Choices,
    Draw,
    Loading,
    Logits,
    Model,
    Segment,
    View,
    diffusion_segment,
)

Taps = NDArray[np.float32]


class Network(Protocol):
    """A drafter's network on one runtime, loaded for one model there."""

    @property
    def config(self) -> ModelConfig:
        """Its own sizes; block size and mask token are of its blocks."""
        ...

    @property
    def beside(self) -> Beside:
        """What it is to the model."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the model whose input it reads (`Segment.taps`)."""
        ...

    def new_cache(self, capacity: int) -> Any:
        """An empty cache (`protocol.Cache`). Raises OrthrusError when it cannot fit."""
        ...

    def inject(self, cache: Any, tokens: Sequence[int], taps: Taps) -> None:
        """Put rows behind those that a cache of it holds. tokens: theirs. taps: [taps, rows,
        n_embd]."""
        ...

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """As `Model.forward`, for drafts (`DraftCache.segment`) on caches of it."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class DraftCache:
    """What a drafter's network knows of one sequence.

    Taps wait until a draft is wanted, or until they fill a pass: where nobody drafts, following the
    text costs little.
    """

    def __init__(self, network: Network, capacity: int) -> None:
        """capacity: tokens of the context. Raises OrthrusError when it cannot fit."""
        self.taps, self.beside = network.taps, network.beside
        self._network, self._cache, self._capacity = network, network.new_cache(capacity), capacity
        self._tokens: list[int] = []
        self._waiting: list[Taps] = []

    @property
    def length(self) -> int:
        """Rows that it was told of: positions `0 .. length-1`."""
        return len(self._tokens)

    @property
    def capacity(self) -> int:
        return self._capacity

    def known(self, tokens: Sequence[int]) -> int:
        """How many of the first `tokens` it was told of."""
        pairs = zip(self._tokens, tokens, strict=False)
        unlike = (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        return next(unlike, min(len(self._tokens), len(tokens)))

    def segment(self, anchor: int, start: int, tokens: int, draw: Draw) -> Segment:
        """What asks for a draft of `tokens` tokens behind the anchor, which is at `start`.

        A chain has a row for each, the anchor's first; each of the others stands for what the row
        before it draws. A block is always whole (its rows see one another, and were trained so):
        its row i says the token i positions behind the anchor.
        """
        if self.beside.chain:
            rows = (anchor,) * tokens
            return Segment(self, View.DRAFTER, rows, start, range(tokens), None, draw)
        mask = self._network.config.mask_token
        assert mask is not None
        wanted, size = range(1, tokens + 1), self.beside.block
        return diffusion_segment(
            self, anchor, mask, size, start, wanted=wanted, draw=draw, view=View.DRAFTER
        )

    def reachable(self, length: int) -> int:
        """How many of the first `length` rows it can go back to, of those that it was told of."""
        if length > self._cache.length:
            self._flush()
        return int(self._cache.checkpoint(length).length)

    def checkpoint(self) -> None:
        """See `Cache.checkpoint`: it will be able to come back to where it stands."""
        self._flush()
        self._cache.checkpoint()

    def follow(self, tokens: Sequence[int], start: int, taps: Taps) -> None:
        """Learn of the committed rows from `start` on. What it held behind `start` is gone; rows
        before it that it was not told of, or cannot go back to, stay unknown, and it learns nothing
        (`length` tells).

        tokens: all that are committed. taps: [taps, rows, n_embd].
        """
        if start > self.length:
            return
        self.go_back(start)
        if self.length < start:
            return
        rows = taps.shape[1]
        self._tokens += tokens[start : start + rows]
        self._waiting.append(taps)
        if self.length - self._cache.length >= BATCH_ROWS:
            self._flush()

    def go_back(self, length: int) -> None:
        """Forget what lies behind the first `length` rows, or those that it can go back to."""
        if length < self.length:
            self._flush()
            place = self._cache.checkpoint(length)
            self._cache.restore(place)
            del self._tokens[place.length :]

    def assume(self, rows: int) -> None:
        """See `Cache.assume`."""
        self._flush()
        self._cache.assume(rows)
        self._tokens += [0] * rows

    def take(self, rows: int) -> list[NDArray[np.uint8]]:
        """See `Portable.take`."""
        self._flush()
        found: list[NDArray[np.uint8]] = self._cache.take(rows)
        return found

    def put(self, parts: Sequence[NDArray[np.uint8]], tokens: Sequence[int]) -> None:
        """Hold the rows of `tokens`, which `take` gave (see `Portable.put`)."""
        self._cache.put(parts, len(tokens))
        self._tokens, self._waiting = list(tokens), []

    def ready(self) -> Any:
        """The network's cache, with all rows that it was told of."""
        self._flush()
        return self._cache

    def _flush(self) -> None:
        if not self._waiting:
            return
        taps = np.concatenate(self._waiting, axis=1)
        tokens = self._tokens[self._cache.length :]
        self._waiting = []
        for first in range(0, len(tokens), BATCH_ROWS):
            rows = slice(first, first + BATCH_ROWS)
            self._network.inject(self._cache, tokens[rows], taps[:, rows])


class ModelWithDrafter:
    """See `protocol.Model`. The drafter's blocks run behind the model's pass.

    model: without the drafter.
    """

    def __init__(self, model: Model, network: Network) -> None:
        """Owns both."""
        self.model, self._network = model, network
        self.config = replace(model.config, beside=network.beside)

    @property
    def description(self) -> str:
        return f"{self.model.description}, with drafter {self._network.config.name}"

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """See `Threaded`; empty where the runtime is none."""
        return getattr(self.model, "thread_counts", ())

    def use_threads(self, count: int) -> None:
        """See `Threaded.use_threads`. The network runs on the model's threads."""
        self.model.use_threads(count)  # type: ignore[attr-defined]

    def wait(self) -> None:
        """See `Loading.wait`. The network's weights come behind the model's."""
        if isinstance(self.model, Loading):
            self.model.wait()

    def close(self) -> None:
        self._network.close()
        self.model.close()

    def new_cache(self, capacity: int) -> Any:
        return self.model.new_cache(capacity)

    def new_draft_cache(self, capacity: int) -> DraftCache:
        """What the drafter will know of a sequence of up to `capacity` tokens; nothing yet."""
        return DraftCache(self._network, capacity)

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """See `Model.forward`."""
        if all(segment.view is not View.DRAFTER for segment in segments):
            return self.model.forward(segments)
        blocks = [_of_network(s) for s in segments if s.view is View.DRAFTER]
        others = [s for s in segments if s.view is not View.DRAFTER]
        rest = iter(self.model.forward(others) if others else ())
        drafted = iter(self._network.forward(blocks))
        return [next(drafted if s.view is View.DRAFTER else rest) for s in segments]

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        """See `Model.logits`; of the model alone."""
        return self.model.logits(segments)


def _of_network(segment: Segment) -> Segment:
    """The draft as the network sees it."""
    if not isinstance(segment.cache, DraftCache):
        raise TypeError(f"expected a drafter's cache, found {segment.cache}")
    return replace(segment, view=View.DIFFUSION, cache=segment.cache.ready())
