"""The AR keys and values of one session, in ggml tensors over lazily committed memory."""

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
from orthrus_gguf.runtime.ggml.trees import TreeLayout, tree_layout
from orthrus_gguf.runtime.limits import memory_bytes
from orthrus_gguf.runtime.protocol import check_path

_serials = itertools.count()


class GgmlCache:
    """See `segments.Cache`. Beyond `capacity` there is room for the rows of diffusion blocks.

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
        self._tree: TreeLayout | None = None
        stack = ExitStack()
        memory = _reserve(layout, capacity, self.rows)
        stack.callback(memory.close)
        self._address = address = np.frombuffer(memory, np.uint8).ctypes.data
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

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate a cache of {self._length} rows to {length}")
        self._length = length
        self._tree = None

    def append(self, rows: int) -> None:
        """Count `rows` more rows as held: a pass has written them."""
        if not 0 <= rows <= self._capacity - self._length:
            raise ValueError(f"no room for {rows} rows after {self._length} of {self._capacity}")
        self._length += rows
        self._tree = None

    def fit_tree(self, parents: Sequence[int]) -> int:
        """See `TreeCache.fit_tree`. Branches take groups of rows beyond those in use."""
        count = len(parents)
        while count > 1 and tree_layout(parents[:count], self._length).columns > self.rows:
            count -= 1
        return count

    def make_room(self, tree: TreeLayout) -> None:
        """Prepare the regions of a tree that is about to run. Raises ValueError if one is cut."""
        if tree.columns > self.rows:
            raise ValueError(
                f"a tree of {len(tree.parents)} rows with {len(tree.regions) + 1} leaves at"
                f" {tree.start} needs {tree.columns} cache rows, there are {self.rows}"
            )
        copied = np.arange(tree.edge, tree.start)
        for region in tree.regions:
            self._copy(copied, copied + (region - tree.edge))

    def plant(self, tree: TreeLayout | None) -> None:
        """Remember the tree whose rows have been written, for `keep_path`; None forgets it."""
        self._tree = tree

    def keep_path(self, rows: Sequence[int]) -> None:
        """See `TreeCache.keep_path`."""
        tree = self._tree
        check_path(rows, () if tree is None else tree.parents)
        assert tree is not None
        kept = np.arange(len(rows)) + tree.start
        self._copy(np.array([tree.column(row) for row in rows]), kept)
        self.append(len(rows))

    def _copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy the keys and values of rows, in every layer."""
        sources, targets = sources[sources != targets], targets[sources != targets]
        layout, offset = self.layout, 0
        sizes = [
            _tensor_bytes(layout, qtype, self.rows) for qtype in (layout.type_k, layout.type_v)
        ]
        memory = array_at(self._address, np.uint8, (layout.n_layers * sum(sizes),))
        for qtype, size, by_row in zip(
            (layout.type_k, layout.type_v), sizes, (True, not layout.transposed), strict=True
        ):
            # Lines of one item per row: of a head's elements where they lie together.
            lines = layout.n_head_kv * (1 if by_row else layout.head_dim)
            qblock, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
            item = (layout.head_dim // qblock if by_row else 1) * n_bytes
            items: NDArray[np.void] = np.ndarray(
                (layout.n_layers, lines, self.rows),
                np.dtype((np.void, item)),
                memory,
                offset,
                (sum(sizes), self.rows * item, item),
            )
            items[:, :, targets] = items[:, :, sources]
            offset += size

    def close(self) -> None:
        """Free the memory; the cache cannot be used afterwards."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive


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
