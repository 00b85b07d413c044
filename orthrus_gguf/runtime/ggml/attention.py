"""Attention over the cache, as ggml operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gguf
import numpy as np

from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.cache_layout import transposed

#: Keys and values are clamped to the range of F16 before they are stored. A wild draft could
#: otherwise leave an infinity in rows that attention hides from everybody else, and infinity times
#: a weight of zero is NaN.
STORED_LIMIT = float(np.finfo(np.float16).max)

_F16_BYTES = 2
_I64_BYTES = 8


@dataclass(frozen=True)
class CachedAttention:
    """Stores keys and values of one sequence's rows in a pass and attends to them.

    `first` and `count` name rows among the sequence's own.
    graph: that stores are put into at once, so that they come before what reads them.
    columns: cache rows to attend to. mask: F16 [rows, columns], 0 or -inf.
    key_rows, value_rows: where the rows go in the cache (see `input_tensors.ShareInputs`).
    """

    api: Ggml
    context: int
    graph: int
    cache: GgmlCache
    n_head: int
    columns: int
    mask: int
    key_rows: int
    value_rows: int

    def store(self, k: int, v: int, layer: int, first: int, count: int) -> None:
        """k, v [head_dim, n_head_kv, count], clamped → the cache's rows for them."""
        api, layout = self.api, self.cache.layout
        self._store_by_head(k, self.cache.keys[layer], self.key_rows, first, count)
        values = self.cache.values[layer]
        if not transposed(layout):
            self._store_by_head(v, values, self.value_rows, first, count)
            return
        elements = layout.kv_dim * count
        target = api.reshape_2d(self.context, values, 1, layout.kv_dim * self.cache.rows)
        source = api.reshape_2d(self.context, v, 1, elements)
        self._set_rows(target, source, self.value_rows, first * layout.kv_dim, elements)

    def attend(self, q: int, layer: int, first: int, count: int) -> int:
        """q [head_dim, n_head, count] → weighted values, count times n_head * head_dim of them."""
        api, c, layout = self.api, self.context, self.cache.layout
        keys = self._visible_by_head(self.cache.keys[layer], layout.type_k)
        width = self.columns * _F16_BYTES
        mask = api.view_2d(c, self.mask, self.columns, count, width, first * width)
        scale = 1 / math.sqrt(layout.head_dim)
        if not transposed(layout):
            values = self._visible_by_head(self.cache.values[layer], layout.type_v)
            queries = api.permute(c, q, 0, 2, 1, 3)
            return int(api.flash_attn_ext(c, queries, keys, values, mask, scale, 0.0, 0.0))
        # Rows lie along the fourth dimension for the reason that multiply_rows gives.
        queries = api.reshape_4d(c, q, layout.head_dim, 1, self.n_head, count)
        mask = api.reshape_4d(c, mask, self.columns, 1, 1, count)
        weights = api.soft_max_ext(c, api.mul_mat(c, keys, queries), mask, scale, 0.0)
        return int(api.mul_mat(c, self._visible_transposed(self.cache.values[layer]), weights))

    def _store_by_head(self, x: int, cache: int, slots: int, first: int, count: int) -> None:
        """x [head_dim, n_head_kv, count] → a cache tensor that lies head by head."""
        api, c, layout = self.api, self.context, self.cache.layout
        target = api.reshape_3d(c, cache, layout.head_dim, self.cache.rows, layout.n_head_kv)
        self._set_rows(target, api.permute(c, x, 0, 2, 1, 3), slots, first, count)

    def _set_rows(self, target: int, source: int, slots: int, first: int, count: int) -> None:
        chosen = self.api.view_1d(self.context, slots, count, first * _I64_BYTES)
        stored = self.api.set_rows(self.context, target, source, chosen)
        self.api.build_forward_expand(self.graph, stored)

    def _visible_by_head(self, tensor: int, qtype: gguf.GGMLQuantizationType) -> int:
        """[head_dim, columns, n_head_kv] of a cache tensor that lies head by head."""
        layout = self.cache.layout
        row = self.api.row_size(int(qtype), layout.head_dim)
        sizes = (layout.head_dim, self.columns, layout.n_head_kv)
        strides = (row, row * self.cache.rows)
        return int(self.api.view_3d(self.context, tensor, *sizes, *strides, 0))

    def _visible_transposed(self, tensor: int) -> int:
        """[columns, head_dim, n_head_kv] of a cache tensor of transposed values."""
        layout = self.cache.layout
        row = self.cache.rows * self.api.row_size(int(layout.type_v), 1)
        sizes = (self.columns, layout.head_dim, layout.n_head_kv)
        strides = (row, row * layout.head_dim)
        return int(self.api.view_3d(self.context, tensor, *sizes, *strides, 0))
