"""MTP drafts on any runtime: a chain of passes through one block, each with what the last one drew.

Row k of what the block keeps is made of token k and of what the model's last layer gave for the
token before (zeros before the first one). Only rows of committed tokens stay, all with the model's
own values; those of a draft are written behind them, with the block's, and overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.checkpoints import Checkpoints
from orthrus_gguf.runtime.drawing import Prefix
from orthrus_gguf.runtime.protocol import Checkpoint, Choices, Logits, Segment
from orthrus_gguf.sampling import Choice

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """A row of a draft: its token, what the one before gave [n_embd], and its position in `rows`,
    which hold all rows before."""

    rows: Any
    token: int
    hidden: Floats
    position: int


class Block(Protocol):
    """The block's arithmetic on one runtime."""

    @property
    def config(self) -> ModelConfig: ...

    def new_rows(self, capacity: int) -> Any:
        """Keys and values for so many rows (`protocol.Cache`). Raises OrthrusError when they cannot
        fit."""
        ...

    def learn(self, rows: Any, tokens: Sequence[int], hidden: Floats) -> None:
        """Put rows behind those that there are, to stay. hidden: [len(tokens), n_embd], what the
        row before each of them gave."""
        ...

    def draft(self, chains: Sequence[Chain]) -> None:
        """Run chains to their ends."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class MtpCache:
    """See `protocol.Cache`: what a block knows of a sequence.

    Beside keys and values, what the model gave for its last row, which the next one needs. To go
    back it must have been kept, as the states of the model's own layers.
    """

    def __init__(self, rows: Any, n_embd: int) -> None:
        self.rows = rows
        self.hidden: Floats = np.zeros(n_embd, np.float32)
        self._kept = Checkpoints[Floats](self.hidden.nbytes)

    @property
    def length(self) -> int:
        return int(self.rows.length)

    @property
    def capacity(self) -> int:
        return int(self.rows.capacity)

    def follow(self, block: Block, tokens: Sequence[int], hidden: Floats) -> None:
        """Learn of the next rows. hidden: [len(tokens), n_embd], what the model gave for them."""
        before = np.concatenate([self.hidden[None], hidden[:-1]])
        block.learn(self.rows, tokens, before)
        self.hidden = hidden[-1].copy()
        if self._kept.due(self.length):
            self.checkpoint()

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        """See `Cache.checkpoint`."""
        if length is None:
            self._kept.keep(self.length, self.hidden)
        return self._kept.reach(self.rows.checkpoint(length), self.length)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Cache.restore`."""
        length = checkpoint.length
        self._kept.check(length, self.length)
        if length < self.length:
            kept = self._kept.get(length)
            self.hidden = np.zeros_like(self.hidden) if kept is None else kept
        self._kept.forget_behind(length)
        self.rows.restore(checkpoint)

    def assume(self, rows: int) -> None:
        """See `Cache.assume`."""
        self.rows.assume(rows)

    def take(self, rows: int) -> list[NDArray[np.uint8]]:
        """See `Portable.take`."""
        self._kept.check(rows, self.length)
        kept = self.hidden if rows == self.length else self._kept.get(rows)
        hidden = np.zeros_like(self.hidden) if kept is None else kept
        return [*self.rows.take(rows), hidden.view(np.uint8).copy()]

    def put(self, parts: Sequence[NDArray[np.uint8]], rows: int) -> None:
        """See `Portable.put`."""
        if not parts or parts[-1].shape != (self.hidden.nbytes,):
            raise ValueError(f"not {rows} rows of this block")
        self.rows.put(parts[:-1], rows)
        self.hidden = parts[-1].view(np.float32).copy()
        self._kept.clear()
        self.checkpoint()


class MtpNetwork:
    """See `beside.Network`."""

    def __init__(self, block: Block, beside: Beside, taps: tuple[int, ...]) -> None:
        """Owns the block."""
        self._block, self.beside, self.taps, self.config = block, beside, taps, block.config

    def new_cache(self, capacity: int) -> MtpCache:
        return MtpCache(self._block.new_rows(capacity), self.config.n_embd)

    def inject(self, cache: MtpCache, tokens: Sequence[int], taps: Floats) -> None:
        """See `Network.inject`."""
        cache.follow(self._block, tokens, taps[0])

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """See `Network.forward`: row i of a segment says the token behind that which row i - 1
        said."""
        chains = [Chain(segment) for segment in segments]
        self._block.draft(chains)
        return [Choices(chain.choices) for chain in chains]

    def close(self) -> None:
        self._block.close()


class Chain:
    """A draft under way. It ends early where nothing can be drawn.

    rows: what the block holds before it. token, hidden: what its next row is made of. start: the
    position of its first row. length: how many rows it has.
    """

    def __init__(self, segment: Segment) -> None:
        if not isinstance(segment.cache, MtpCache):
            raise TypeError(f"expected an MTP block's cache, found {segment.cache}")
        if segment.draw is None or segment.wanted != range(len(segment)):
            raise ValueError("every row of a chain is drawn")
        if segment.start != segment.cache.length:
            raise ValueError(f"a chain at {segment.start} behind {segment.cache.length} rows")
        self.draw, self.start, self.rows = segment.draw, segment.start, segment.cache.rows
        self.token, self.hidden = segment.tokens[0], segment.cache.hidden
        self.length = len(segment)
        self._found: list[Choice] = []
        self._ended = False

    @property
    def done(self) -> bool:
        return self._ended or len(self._found) == self.length

    @property
    def entry(self) -> Entry:
        """The row that runs next."""
        return Entry(self.rows, self.token, self.hidden, self.start + len(self._found))

    def follow(self, hidden: Floats, logits: NDArray[np.float32]) -> None:
        """Draw from what the next row gave, and go on with that."""
        prefix = Prefix(self.draw, self.start, [choice.token for choice in self._found])
        choice = self.draw.sampler.draw(logits, prefix, detail=self.draw.detail)
        self.take([choice])
        if choice is not None:
            self.token, self.hidden = choice.token, hidden

    def take(self, choices: Sequence[Choice | None]) -> None:
        """These are what the next rows drew."""
        for choice in choices:
            self._ended |= choice is None
            if choice is not None and not self._ended:
                self._found.append(choice)

    @property
    def choices(self) -> tuple[Choice | None, ...]:
        """One per row."""
        return (*self._found, *[None] * (self.length - len(self._found)))


def run_stepwise(
    step: Callable[[Sequence[Entry]], tuple[Floats, Logits]], chains: Sequence[Chain]
) -> None:
    """Run chains to their ends, one row of each at a time, where logits are the host's.

    step: what rows of drafts give, [len(entries), n_embd], and the logits of what follows them.
    """
    while running := [chain for chain in chains if not chain.done]:
        hidden, logits = step([chain.entry for chain in running])
        for i, chain in enumerate(running):
            chain.follow(hidden[i], logits[i])
