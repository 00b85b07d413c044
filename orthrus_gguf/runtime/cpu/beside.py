"""What networks beside a model share on the native kernels: its threads, and room of their own."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.rope import frequencies
from orthrus_gguf.runtime.cache_layout import BATCH_ROWS, CacheLayout
from orthrus_gguf.runtime.cpu.buffers import Buffers
from orthrus_gguf.runtime.cpu.cache import CpuCache
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.cpu.rows import Angles, place_chain
from orthrus_gguf.runtime.cpu.weights import Floats, Weights
from orthrus_gguf.runtime.host_model import HostModel


class CpuBeside(CpuModel):
    """A network that runs on the threads of its target, one pass of either at a time."""

    def __init__(self, config: ModelConfig, weights: Weights, target: CpuModel) -> None:
        """Owns the weights, but for what is the target's."""
        ours = target._layout
        layout = CacheLayout(
            ours.type_k, ours.type_v, config.n_layers, config.n_head_kv, config.head_dim
        )
        HostModel.__init__(self, config, layout, BATCH_ROWS)
        self._lock, self._pool, self._kernels = target._lock, target._pool, target._kernels
        self._weights, self.thread_counts = weights, ()
        stack = ExitStack()
        stack.callback(weights.close)
        self._own(stack)
        self._buffers = Buffers(self._kernels, config, BATCH_ROWS + self._block_rows)
        self._shapes = OrderedDict()
        self._angles = Angles(*frequencies(config.rope, config.rotary_dim))

    def _room_for(self, width: int, form: int) -> tuple[Floats, NDArray[np.uint8]]:
        """Rows of so many elements, and the same in the form that a product takes."""
        rows = np.zeros((BATCH_ROWS, width), np.float32)
        return rows, np.zeros((BATCH_ROWS, self._kernels.row_bytes(form, width)), np.uint8)

    def _put(self, row: int, slot: int, cache: CpuCache, start: int, count: int) -> None:
        """Tell the kernels that rows from `row` on follow one another in a cache from `start` on.

        slot: number of the cache in this pass.
        """
        b, place = self._buffers, place_chain(start, count)
        b.caches[:, slot] = cache.layers
        table = b.row[row : row + count]
        table["cache"] = slot
        place.fill(table, [])
        self._angles.point(table, place.positions)
