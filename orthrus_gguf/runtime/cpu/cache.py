"""Keys and values of one sequence, as the native kernels read them (`attention.c`)."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import LANES, LAYER_CACHE

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.ggml.cache_layout import COLUMNS
from orthrus_gguf.runtime.limits import memory_bytes
from orthrus_gguf.runtime.passes import check_path
from orthrus_gguf.runtime.protocol import Checkpoint
from orthrus_gguf.runtime.trees import TreeLayout, tree_layout


class CpuCache:
    """See `protocol.Cache`. Columns beyond `capacity` are for blocks and branches of trees.

    keys: F16 [n_layers, n_head_kv, columns / 16, head_dim, 16]; values: F16 [n_layers, n_head_kv,
    columns, head_dim]. layers: the kernels' view of both, one record per layer.
    """

    def __init__(self, config: ModelConfig, capacity: int, spare: int) -> None:
        """spare: columns beyond the capacity. Raises OrthrusError if it cannot fit."""
        if capacity < 1:
            raise OrthrusError(f"a context of {capacity} tokens: expected at least 1")
        c = config
        self.columns = -(-(capacity + spare) // COLUMNS) * COLUMNS
        shape = (c.n_layers, c.n_head_kv, self.columns * c.head_dim)
        plane = 2 * int(np.prod(shape))
        available = memory_bytes()
        if 2 * plane > available:
            raise OrthrusError(
                f"a context of {capacity} tokens does not fit: {c.n_layers} layers x {c.n_head_kv}"
                f" key/value heads x {c.head_dim} elements x 4 bytes (f16) x {self.columns} rows ="
                f" {2 * plane / 2**30:.1f} GiB, this machine has {available / 2**30:.1f} GiB;"
                " choose a smaller one with -c"
            )
        # Anonymous memory is zeroed, and committed page by page when it is touched.
        self._memory = mmap.mmap(-1, 2 * plane)
        planes = np.frombuffer(self._memory, np.float16).reshape(2, *shape)
        self.keys: NDArray[np.float16] = planes[0].reshape(
            *shape[:2], self.columns // LANES, c.head_dim, LANES
        )
        self.values: NDArray[np.float16] = planes[1].reshape(*shape[:2], self.columns, c.head_dim)
        self.layers = np.zeros(c.n_layers, LAYER_CACHE)
        for name, array in (("keys", self.keys), ("values", self.values)):
            self.layers[name] = array.ctypes.data + np.arange(c.n_layers) * array.strides[0]
        self.layers["columns"] = self.columns
        self._capacity, self._length = capacity, 0
        self._pending: tuple[int, TreeLayout | None] | None = None

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache.commit`. A chain's rows lie where they belong; a tree's path is copied."""
        if self._pending is None:
            raise ValueError("no AR rows are pending: the last pass on this cache ran none")
        count, tree = self._pending
        check_path(rows, count, None if tree is None else tree.parents)
        if tree is not None:
            self._copy([(tree.column(row), tree.start + i) for i, row in enumerate(rows)])
        self._length += len(rows)
        self._pending = None

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        """See `Cache.checkpoint`: anywhere up to where it stands."""
        length = self._length if length is None else length
        if not 0 <= length <= self._length:
            raise ValueError(f"no place to come back to: {length} of {self._length} rows held")
        return Checkpoint(length)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Cache.restore`."""
        self._length = self.checkpoint(checkpoint.length).length
        self._pending = None

    def assume(self, rows: int) -> None:
        """See `Cache.assume`."""
        if not 0 <= rows <= self._capacity - self._length:
            raise ValueError(f"no room for {rows} rows after {self._length} of {self._capacity}")
        self._length += rows
        self._pending = None

    def fit(self, parents: Sequence[int]) -> int:
        """See `Cache.fit`. Branches take groups of columns beyond those in use."""
        count = len(parents)
        while count > 1 and tree_layout(parents[:count], self._length).columns > self.columns:
            count -= 1
        return count

    def hold(self, rows: int, tree: TreeLayout | None = None) -> None:
        """Have that many rows, which a pass has written, wait for `commit`."""
        self._pending = rows, tree

    def drop(self) -> None:
        """Forget what is pending."""
        self._pending = None

    def make_room(self, tree: TreeLayout) -> None:
        """Prepare the regions of a tree that is about to run. Raises ValueError if one is cut."""
        if tree.columns > self.columns:
            raise ValueError(
                f"a tree of {len(tree.parents)} rows with {len(tree.regions) + 1} leaves at"
                f" {tree.start} needs {tree.columns} columns, there are {self.columns}"
            )
        self._copy(
            [
                (column, region + column - tree.edge)
                for region in tree.regions
                for column in range(tree.edge, tree.start)
            ]
        )

    def _copy(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy columns, (from, to), in every layer."""
        moves = [(source, target) for source, target in moves if source != target]
        if not moves:
            return
        source, target = np.array(moves).T
        panel, lane = np.divmod(target, LANES)
        # Indices around a slice come first in the result, on both sides alike.
        self.keys[:, :, panel, :, lane] = self.keys[:, :, source // LANES, :, source % LANES]
        self.values[:, :, target] = self.values[:, :, source]

    def close(self) -> None:
        """Nothing to free by hand: the memory goes with the last view of it."""
