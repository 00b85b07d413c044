"""What a cache of keys and values in host memory keeps account of, whatever lies in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.cache_layout import CacheLayout
from orthrus_gguf.runtime.passes import check_path
from orthrus_gguf.runtime.protocol import Checkpoint, is_chain
from orthrus_gguf.runtime.trees import TreeLayout, fitting_rows


class HostCache(ABC):
    """See `protocol.Cache`. Rows beyond `capacity` are for blocks and branches of trees.

    layout: of the model that it belongs to. rows: that it has in all.
    """

    layout: CacheLayout
    rows: int

    def __init__(self, capacity: int) -> None:
        """Raises OrthrusError for a context without tokens."""
        if capacity < 1:
            raise OrthrusError(f"a context of {capacity} tokens: expected at least 1")
        self._capacity, self._length = capacity, 0
        #: Rows that the last pass wrote and that nobody has committed yet, and how they lie.
        self._pending: tuple[int, TreeLayout | None] | None = None

    @abstractmethod
    def _copy(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of `count` rows, from one place to another, in every layer."""

    @abstractmethod
    def _views(self, rows: int) -> list[NDArray[np.uint8]]:
        """Where the first rows lie; perhaps with some rows behind them."""

    def take(self, rows: int) -> list[NDArray[np.uint8]]:
        """See `Portable.take`."""
        self.checkpoint(rows)
        return [view.copy() for view in self._views(rows)]

    def put(self, parts: Sequence[NDArray[np.uint8]], rows: int) -> None:
        """See `Portable.put`."""
        if not 0 <= rows <= self._capacity:
            raise ValueError(f"no room for {rows} rows in a cache for {self._capacity}")
        views = self._views(rows)
        if [part.shape for part in parts] != [view.shape for view in views]:
            raise ValueError(f"not {rows} rows of this model and these cache types")
        for view, part in zip(views, parts, strict=True):
            view[...] = part
        self._length, self._pending = rows, None

    @abstractmethod
    def close(self) -> None:
        """Free the memory; the cache cannot be used afterwards."""

    @property
    @abstractmethod
    def closed(self) -> bool: ...

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
            self._move((tree.column(row), tree.start + i) for i, row in enumerate(rows))
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
        """See `Cache.fit`. Branches take groups of rows beyond those in use."""
        if is_chain(parents):
            return len(parents)
        return fitting_rows(parents, self._length, self.rows)

    def hold(self, rows: int, tree: TreeLayout | None = None) -> None:
        """Have that many rows, which a pass has written, wait for `commit`."""
        self._pending = rows, tree

    def drop(self) -> None:
        """Forget what is pending."""
        self._pending = None

    def make_room(self, tree: TreeLayout) -> None:
        """Prepare the regions of a tree that is about to run. Raises ValueError if one is cut."""
        if tree.columns > self.rows:
            raise ValueError(
                f"a tree of {len(tree.parents)} rows with {len(tree.regions) + 1} leaves at"
                f" {tree.start} needs {tree.columns} cache rows, there are {self.rows}"
            )
        if tree.start > tree.edge:
            for region in tree.regions:
                self._copy(tree.edge, region, tree.start - tree.edge)

    def _move(self, moves: Iterable[tuple[int, int]]) -> None:
        """Copy rows, (from, to) in ascending order, as few runs."""
        runs: list[list[int]] = []  # source, target, count
        for source, target in moves:
            if runs and [source, target] == [runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]]:
                runs[-1][2] += 1
            elif source != target:
                runs.append([source, target, 1])
        for run in runs:
            self._copy(*run)
