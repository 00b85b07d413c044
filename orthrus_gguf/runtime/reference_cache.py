"""What the reference runtime holds of a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.passes import check_path
from orthrus_gguf.runtime.protocol import Checkpoint, path_to


class ReferenceCache:
    """AR keys and values per layer of attention, float32, each [capacity, n_head_kv, head_dim].

    Of pending rows, the path to the one that ran last lies behind the committed rows, and every row
    is kept besides, so that another path can be put there.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        layers = config.layer_kinds.count(LayerKind.ATTENTION)
        shape = (layers, capacity, config.n_head_kv, config.head_dim)
        try:
            # Pages of an untouched allocation cost nothing, so the full size can be reserved.
            self.k, self.v = torch.empty(shape), torch.empty(shape)
        except RuntimeError as error:
            gib = 2 * 4 * math.prod(shape) / 2**30
            raise OrthrusError(
                f"a context of {capacity} tokens needs {gib:.1f} GiB of key/value cache, which"
                " cannot be allocated; choose a smaller one with -c"
            ) from error
        self._length = 0
        self._parents: tuple[int, ...] = ()  # of the pending rows
        self._rows: list[tuple[Tensor, Tensor]] = []  # k, v of each [n_layers, n_head_kv, head_dim]
        self._path: list[int] = []  # rows at the positions from `length` on

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache.commit`."""
        if not self._parents:
            raise ValueError("no rows are pending")
        check_path(rows, len(self._rows), self._parents)
        self._put(list(rows))
        self._length += len(rows)
        self.pend(())

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        """See `Cache.checkpoint`."""
        length = self._length if length is None else length
        if not 0 <= length <= self._length:
            raise ValueError(f"no checkpoint at {length} in a cache of {self._length} rows")
        return Checkpoint(length)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Cache.restore`."""
        self._length = self.checkpoint(checkpoint.length).length
        self.pend(())

    def fit(self, parents: Sequence[int]) -> int:
        """See `Cache.fit`: rows of a tree need no room, only a path of it does."""
        return len(parents)

    def assume(self, rows: int) -> None:
        """See `Cache.assume`."""
        if not 0 <= rows <= self.capacity - self._length:
            raise ValueError(f"no room for {rows} rows behind {self._length} of {self.capacity}")
        self._length += rows
        self.pend(())

    def take(self, rows: int) -> list[NDArray[np.uint8]]:
        """See `Portable.take`."""
        self.checkpoint(rows)
        return [self._bytes(part)[:, :rows].copy() for part in (self.k, self.v)]

    def put(self, parts: Sequence[NDArray[np.uint8]], rows: int) -> None:
        """See `Portable.put`."""
        if not 0 <= rows <= self.capacity:
            raise ValueError(f"no room for {rows} rows in a cache for {self.capacity}")
        views = [self._bytes(part)[:, :rows] for part in (self.k, self.v)]
        if [part.shape for part in parts] != [view.shape for view in views]:
            raise ValueError(f"not {rows} rows of this model")
        for view, part in zip(views, parts, strict=True):
            view[...] = part
        self._length = rows
        self.pend(())

    @staticmethod
    def _bytes(part: Tensor) -> NDArray[np.uint8]:
        """The memory of keys or values, [n_layers, capacity, bytes of a row]."""
        found: NDArray[np.uint8] = part.numpy().view(np.uint8)
        return found.reshape(*part.shape[:2], -1)

    def aside(self, start: int) -> AbstractContextManager[None]:
        """For a block behind the rows before `start`, of which nothing stays."""
        return nullcontext()

    def pend(self, parents: tuple[int, ...]) -> None:
        """Begin an AR segment, whose rows will be added; drop what was pending."""
        self._parents, self._rows, self._path = parents, [], []

    def make_way(self) -> int:
        """Put the ancestors of the next pending row where it sees them; return its position."""
        parent = self._parents[len(self._rows)]
        if parent != (self._path[-1] if self._path else -1):
            self._put(path_to(parent, self._parents))
        return self._length + len(self._path)

    def add_row(self) -> None:
        """Take what has been written at the position of `make_way` as the next pending row."""
        position = self._length + len(self._path)
        self._path.append(len(self._rows))
        self._rows.append((self.k[:, position].clone(), self.v[:, position].clone()))

    def _put(self, path: list[int]) -> None:
        """Let these pending rows lie at the positions from `length` on."""
        for i, row in enumerate(path):
            if self._path[i : i + 1] != [row]:
                self.k[:, self._length + i], self.v[:, self._length + i] = self._rows[row]
        self._path = path
