"""The memory that a model needs on the native kernels, from its config and its tensors' types.

Weights and cache are exact; buffers are for the largest pass there is, and mostly untouched.
"""

from __future__ import annotations

import math

from orthrus_cpu_kernels.library import CHUNK_COLUMNS, Kernels

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cache_layout import BATCH_ROWS, CacheLayout, cache_rows, spare_rows
from orthrus_gguf.runtime.cpu.buffers import buffer_bytes as bytes_of_rows
from orthrus_gguf.runtime.cpu.cache import whole_panels
from orthrus_gguf.runtime.cpu.state import StateLayout, tile_columns
from orthrus_gguf.runtime.cpu.weights import is_packed, is_used, packed_bytes


def weight_bytes(kernels: Kernels, config: ModelConfig, info: TensorInfo) -> int:
    """Bytes of a tensor in memory: repacked, or as floats."""
    if is_packed(config, info):
        return packed_bytes(kernels, info)
    return 4 * math.prod(info.shape) if is_used(config, info) else 0


def cache_bytes(config: ModelConfig, layout: CacheLayout, context: int) -> int:
    """Bytes of a cache for `context` tokens, with its spare and padding rows; of a hybrid, with its
    states and records."""
    rows = cache_rows(whole_panels(context), whole_panels(spare_rows(config)))
    state = 0 if config.hybrid is None else 4 * StateLayout.of(config).floats
    return round(rows * layout.row_bytes()) + state


def buffer_bytes(kernels: Kernels, config: ModelConfig, threads: int) -> int:
    """Bytes that the passes need besides weights and cache, at worst."""
    block = spare_rows(config)
    together = max(BATCH_ROWS, block) * config.n_head // config.n_head_kv
    scratch = 4 * together * (CHUNK_COLUMNS + 2 + config.head_dim)
    if config.hybrid is not None:
        scratch = max(scratch, 4 * config.hybrid.head_dim * tile_columns(config.hybrid))
    return bytes_of_rows(kernels, config, BATCH_ROWS + block) + threads * scratch
