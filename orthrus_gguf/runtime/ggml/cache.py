"""The AR keys and values of one sequence, in ggml tensors over lazily committed memory."""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections.abc import Sequence
from contextlib import ExitStack

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.tensors import ALIGNMENT, Tensors, array_at
from orthrus_gguf.runtime.ggml.cache_layout import CacheLayout, cache_rows
from orthrus_gguf.runtime.limits import memory_bytes
from orthrus_gguf.runtime.passes import check_path
from orthrus_gguf.runtime.protocol import Checkpoint
from orthrus_gguf.runtime.trees import TreeLayout, tree_layout

_serials = itertools.count()


class GgmlCache:
    """See `protocol.Cache`. Beyond `capacity` there is room for the rows of diffusion blocks.

    A pass writes the keys and values of its diffusion rows right after the committed rows, where
    the next AR rows overwrite them: they are never part of the cache, and need no memory or copies
    of their own.
    """

    def __init__(self, api: Ggml, layout: CacheLayout, capacity: int, spare_rows: int) -> None:
        """spare_rows: the most diffusion rows of one pass. Raises OrthrusError if it cannot fit."""
        if capacity < 1:
            raise OrthrusError(f"a context of {capacity} tokens: expected at least 1")
        self.layout = layout
        self.rows = cache_rows(capacity, spare_rows)
        self.serial = next(_serials)
        #: See `InputArrays.fill`.
        self.element_offsets = np.arange(layout.kv_dim if layout.transposed else 1) * self.rows
        self._capacity = capacity
        self._length = 0
        #: Rows that the last pass wrote and that nobody has committed yet, and how they lie.
        self._pending: tuple[int, TreeLayout | None] | None = None
        stack = ExitStack()
        memory = _reserve(layout, capacity, self.rows)
        stack.callback(memory.close)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self._lines = _lines(layout, self.rows, address)
        tensors = Tensors(api, 2 * layout.n_layers)
        stack.callback(tensors.close)
        self._finalizer = weakref.finalize(self, stack.close)
        self.keys: list[int] = []
        self.values: list[int] = []
        head_rows = (layout.n_head_kv * self.rows, layout.head_dim)
        for _ in range(layout.n_layers):
            for qtype, kind in ((layout.type_k, self.keys), (layout.type_v, self.values)):
                kind.append(tensors.place(int(qtype), head_rows, address))
                address += _tensor_bytes(layout, qtype, self.rows)

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
            for i, row in enumerate(rows):
                self._copy(tree.column(row), tree.start + i, 1)
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
        count = len(parents)
        while count > 1 and tree_layout(parents[:count], self._length).columns > self.rows:
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
        if tree.columns > self.rows:
            raise ValueError(
                f"a tree of {len(tree.parents)} rows with {len(tree.regions) + 1} leaves at"
                f" {tree.start} needs {tree.columns} cache rows, there are {self.rows}"
            )
        for region in tree.regions:
            self._copy(tree.edge, region, tree.start - tree.edge)

    def _copy(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of `count` rows, from one place to another, in every layer."""
        if source == target:
            return
        for lines, item in self._lines:
            first = lines[:, :, source * item : (source + count) * item]
            lines[:, :, target * item : (target + count) * item] = first

    def close(self) -> None:
        """Free the memory; the cache cannot be used afterwards."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive


def _lines(layout: CacheLayout, rows: int, address: int) -> list[tuple[NDArray[np.uint8], int]]:
    """Bytes of keys and of values in which a row takes one item, [layers, lines, rows * item], and
    the size of that item: a head's elements where they lie together, else one element."""
    found, offset = [], 0
    types = (layout.type_k, True), (layout.type_v, not layout.transposed)
    sizes = [_tensor_bytes(layout, qtype, rows) for qtype, _ in types]
    memory = array_at(address, np.uint8, (layout.n_layers * sum(sizes),))
    for (qtype, by_head), size in zip(types, sizes, strict=True):
        qblock, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
        item = (layout.head_dim // qblock if by_head else 1) * n_bytes
        count = layout.n_head_kv * (1 if by_head else layout.head_dim)
        lines: NDArray[np.uint8] = np.ndarray(
            (layout.n_layers, count, rows * item),
            np.uint8,
            memory,
            offset,
            (sum(sizes), rows * item, 1),
        )
        found.append((lines, item))
        offset += size
    return found


def _tensor_bytes(layout: CacheLayout, qtype: gguf.GGMLQuantizationType, rows: int) -> int:
    """Bytes of one layer's keys or values, padded so that the next tensor is aligned."""
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    n_bytes = rows * layout.kv_dim // block * size
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _reserve(layout: CacheLayout, capacity: int, rows: int) -> mmap.mmap:
    """Address space for the whole cache. The system commits zeroed pages when they are touched."""
    n_bytes = layout.n_layers * sum(
        _tensor_bytes(layout, qtype, rows) for qtype in (layout.type_k, layout.type_v)
    )
    available = memory_bytes()
    if n_bytes <= available:
        try:
            return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            pass
    types = f"{layout.type_k.name.lower()}/{layout.type_v.name.lower()}"
    raise OrthrusError(
        f"a context of {capacity} tokens does not fit: {layout.n_layers} layers x "
        f"{layout.n_head_kv} key/value heads x {layout.head_dim} elements x "
        f"{layout.row_bytes() / (layout.n_layers * layout.kv_dim):g} bytes ({types}) x {rows} rows "
        f"= {n_bytes / 2**30:.1f} GiB, this machine has {available / 2**30:.1f} GiB; "
        "choose a smaller one with -c, or smaller cache types with -ctk and -ctv"
    )
