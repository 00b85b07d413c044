"""How values lie in ggml's cache, and how many rows and columns a graph has."""

from __future__ import annotations

import gguf

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cache_layout import COLUMNS, CacheLayout

_TYPES = gguf.GGMLQuantizationType

#: Memory that attention scores of one pass may take. Long contexts get smaller prompt batches.
SCORE_BYTES = 32 << 20

#: A pass has at least this many AR rows, however long the context.
MIN_ROWS = 32


def transposed(layout: CacheLayout) -> bool:
    """Whether values lie transposed.

    Keys lie head by head, [n_head_kv, rows, head_dim]: attention then reads one head's keys in one
    stream. Values lie transposed, [n_head_kv, head_dim, rows], where their type has no qblocks: the
    weighted sum over keys is then an ordinary matrix product with float32 accumulators. (ggml's
    flash attention sums F16 values in F16: 2.5 % off at 4,096 keys, 19 % at 16,384.) Quantized
    values lie like the keys and go through flash attention, which sums those in float32.
    """
    return layout.type_v in (_TYPES.F32, _TYPES.F16)


def ar_rows(config: ModelConfig, layout: CacheLayout, reach: int, most: int) -> int:
    """AR rows of one pass that sees `reach` cache rows: `most`, or as many as keep its attention
    scores within SCORE_BYTES. Flash attention stores no scores."""
    if not transposed(layout):
        return most
    rows = SCORE_BYTES // (reach * config.n_head * 4)
    return min(most, max(rows // MIN_ROWS * MIN_ROWS, MIN_ROWS))


def columns_for(rows: int) -> int:
    """Cache columns that a graph spans to reach `rows` rows: more, so that it serves a while.

    Steps grow with the context (an eighth of it, at least COLUMNS): hidden columns cost time, new
    graphs too.
    """
    step = max(COLUMNS, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step
