"""Keys and values of one sequence, as the native kernels read them (`cache.h`)."""

from __future__ import annotations

import mmap
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import LANES, LAYER_CACHE

from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.cache_layout import CacheLayout, cache_rows
from orthrus_gguf.runtime.host_cache import HostCache
from orthrus_gguf.runtime.limits import memory_bytes, private_memory


@dataclass(frozen=True)
class _Keys:
    """How the keys of a panel of 16 columns lie: parts with the columns along the last axis."""

    parts: tuple[tuple[type[np.generic], int], ...]  # dtype, and lines of 16 per block
    block: int  # elements

    @property
    def dtype(self) -> np.dtype[np.void]:
        return np.dtype([(f"{i}", dtype, (n, LANES)) for i, (dtype, n) in enumerate(self.parts)])


_TYPES = gguf.GGMLQuantizationType
_KEYS = {
    _TYPES.F32: _Keys(((np.float32, 1),), 1),
    _TYPES.F16: _Keys(((np.float16, 1),), 1),
    _TYPES.Q8_0: _Keys(((np.float16, 1), (np.int8, 32)), 32),
    _TYPES.Q4_0: _Keys(((np.float16, 1), (np.uint8, 16)), 32),
}


class CpuCache(HostCache):
    """See `protocol.Cache`.

    keys: records [n_layers, n_head_kv, rows / 16, blocks of a head]. values: bytes [n_layers,
    n_head_kv, rows, bytes of a head]. layers: the kernels' view of both, one record per layer.

    A pass writes the keys and values of its diffusion rows behind all AR rows of the sequence,
    where a panel begins; the next AR rows overwrite them.
    """

    def __init__(self, layout: CacheLayout, capacity: int, spare: int) -> None:
        """spare: the most diffusion rows of one pass. Raises OrthrusError if it cannot fit."""
        super().__init__(capacity)
        self.layout = layout
        # Blocks begin where a panel does, and the last one may end within a panel.
        self.rows = cache_rows(whole_panels(capacity), whole_panels(spare))
        heads = (layout.n_layers, layout.n_head_kv)
        keys = _KEYS[layout.type_k]
        block, size = gguf.GGML_QUANT_SIZES[layout.type_v]
        key_shape = (*heads, self.rows // LANES, layout.head_dim // keys.block)
        value_shape = (*heads, self.rows, layout.head_dim // block * size)
        n_keys = int(np.prod(key_shape)) * keys.dtype.itemsize
        memory = _reserve(layout, capacity, self.rows, n_keys + int(np.prod(value_shape)))
        self.keys: NDArray[np.void] = memory[:n_keys].view(keys.dtype).reshape(key_shape)
        self.values = memory[n_keys:].reshape(value_shape)
        self.layers = np.zeros(layout.n_layers, LAYER_CACHE)
        for name, array in (("keys", self.keys), ("values", self.values)):
            base: Any = array
            self.layers[name] = base.ctypes.data + np.arange(layout.n_layers) * base.strides[0]
        self.layers["columns"] = self.rows
        self.layers["type_k"], self.layers["type_v"] = int(layout.type_k), int(layout.type_v)
        self._closed = False

    def assume(self, rows: int) -> None:
        """See `Cache.assume`. Pages that were never written are all the same one to read, and so
        faster than any others: these are."""
        start = self.length
        super().assume(rows)
        for array in (self.keys, self.values):
            lines = array.view(np.uint8).reshape(*array.shape[:2], -1)
            per_row = lines.shape[2] // self.rows
            lines[:, :, start * per_row : self.length * per_row : mmap.PAGESIZE] = 0

    def _copy(self, source: int, target: int, count: int) -> None:
        self.values[:, :, target : target + count] = self.values[:, :, source : source + count]
        parts = [self.keys[name] for name in self.keys.dtype.names or ()]
        while count:  # panel by panel
            (from_panel, from_lane), (to_panel, to_lane) = (
                divmod(source, LANES),
                divmod(target, LANES),
            )
            run = min(count, LANES - max(from_lane, to_lane))
            for part in parts:
                copied = part[:, :, from_panel, :, :, from_lane : from_lane + run]
                part[:, :, to_panel, :, :, to_lane : to_lane + run] = copied
            source, target, count = source + run, target + run, count - run

    def _views(self, rows: int) -> list[NDArray[np.uint8]]:
        panels = whole_panels(rows) // LANES
        keys = self.keys.view(np.uint8).reshape(*self.keys.shape[:3], -1)
        return [keys[:, :, :panels], self.values[:, :, :rows]]

    def close(self) -> None:
        """See `HostCache.close`. The memory goes with the last view of it."""
        self.drop()
        self._closed = True
        self.keys, self.values = self.keys[:0].copy(), self.values[:0].copy()
        self.layers["keys"] = self.layers["values"] = 0

    @property
    def closed(self) -> bool:
        return self._closed


def whole_panels(rows: int) -> int:
    """The rows of the panels that so many rows touch."""
    return -(-rows // LANES) * LANES


def _reserve(layout: CacheLayout, capacity: int, rows: int, n_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory, which the system commits page by page when it is touched."""
    available = memory_bytes()
    if n_bytes <= available:
        try:
            return np.frombuffer(private_memory(n_bytes), np.uint8)
        except OSError:
            pass
    raise layout.too_large(capacity, rows, n_bytes, available)
