"""The AR keys and values of one sequence, in ggml tensors over lazily committed memory."""

from __future__ import annotations

import itertools
import mmap
import weakref
from contextlib import ExitStack

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.tensors import ALIGNMENT, Tensors, array_at
from orthrus_gguf.runtime.cache_layout import CacheLayout, cache_rows
from orthrus_gguf.runtime.ggml.cache_layout import transposed
from orthrus_gguf.runtime.host_cache import HostCache
from orthrus_gguf.runtime.limits import memory_bytes, private_memory

_serials = itertools.count()


class GgmlCache(HostCache):
    """See `protocol.Cache`.

    A pass writes the keys and values of its diffusion rows right after the committed rows, where
    the next AR rows overwrite them: they are never part of the cache, and need no memory or copies
    of their own.
    """

    def __init__(self, api: Ggml, layout: CacheLayout, capacity: int, spare_rows: int) -> None:
        """spare_rows: the most diffusion rows of one pass. Raises OrthrusError if it cannot fit."""
        super().__init__(capacity)
        self.layout = layout
        self.rows = cache_rows(capacity, spare_rows)
        self.serial = next(_serials)
        #: See `InputArrays.fill`.
        self.element_offsets = np.arange(layout.kv_dim if transposed(layout) else 1) * self.rows
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

    def _copy(self, source: int, target: int, count: int) -> None:
        for lines, item in self._lines:
            first = lines[:, :, source * item : (source + count) * item]
            lines[:, :, target * item : (target + count) * item] = first

    def _views(self, rows: int) -> list[NDArray[np.uint8]]:
        return [lines[:, :, : rows * item] for lines, item in self._lines]

    def close(self) -> None:
        """See `HostCache.close`."""
        self.drop()
        self._finalizer()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive


def _lines(layout: CacheLayout, rows: int, address: int) -> list[tuple[NDArray[np.uint8], int]]:
    """Bytes of keys and of values in which a row takes one item, [layers, lines, rows * item], and
    the size of that item: a head's elements where they lie together, else one element."""
    found, offset = [], 0
    types = (layout.type_k, True), (layout.type_v, not transposed(layout))
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
            return private_memory(n_bytes)
        except OSError:
            pass
    raise layout.too_large(capacity, rows, n_bytes, available)
