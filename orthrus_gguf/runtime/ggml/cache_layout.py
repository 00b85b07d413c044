"""How the CPU runtime lays out its cache and cuts its passes: what its memory need follows from.

Shared by the runtime, which allocates, and by `orthrus-inspect`, which only says how much.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig

_TYPES = gguf.GGMLQuantizationType

#: What `-ctk` and `-ctv` accept.
CACHE_TYPES = {"f32": _TYPES.F32, "f16": _TYPES.F16, "q8_0": _TYPES.Q8_0, "q4_0": _TYPES.Q4_0}

#: Sums over keys run over a multiple of this many columns, so that SIMD loops (up to 64 floats per
#: step) never reach their scalar tail, and hidden columns add exact zeros.
COLUMNS = 64

#: AR rows of one pass, unless the caller says otherwise. More do not make plain kernels faster (256
#: are 3 % slower on a 0.6B model and 14 % on the demo model, since every row then spans the columns
#: of the last), and Ctrl-C waits for the pass to end.
BATCH_ROWS = 64

#: Diffusion rows of one pass: four blocks of the released models. More run as several passes.
BLOCK_ROWS = 128

#: Memory that attention scores of one pass may take. Long contexts get smaller prompt batches.
SCORE_BYTES = 32 << 20

#: A pass has at least this many AR rows, however long the context.
MIN_ROWS = 32


@dataclass(frozen=True)
class CacheLayout:
    """Types and sizes of a cache, in elements.

    Keys lie head by head, [n_head_kv, rows, head_dim]: attention then reads one head's keys in one
    stream. Values lie transposed, [n_head_kv, head_dim, rows], where their type has no qblocks: the
    weighted sum over keys is then an ordinary matrix product with float32 accumulators. (ggml's
    flash attention sums F16 values in F16: 2.5 % off at 4,096 keys, 19 % at 16,384.) Quantized
    values lie like the keys and go through flash attention, which sums those in float32.
    """

    type_k: gguf.GGMLQuantizationType
    type_v: gguf.GGMLQuantizationType
    n_layers: int
    n_head_kv: int
    head_dim: int

    @property
    def transposed(self) -> bool:
        """Whether values lie transposed."""
        return self.type_v in (_TYPES.F32, _TYPES.F16)

    @property
    def kv_dim(self) -> int:
        """Elements of one row's keys, and of its values, in one layer."""
        return self.n_head_kv * self.head_dim

    def row_bytes(self) -> float:
        """Bytes that one row takes over all layers, keys and values."""
        sizes = [gguf.GGML_QUANT_SIZES[qtype] for qtype in (self.type_k, self.type_v)]
        return self.n_layers * self.kv_dim * sum(size / block for block, size in sizes)


def cache_layout(config: ModelConfig, type_k: str, type_v: str) -> CacheLayout:
    """The layout for these cache types. Raises OrthrusError for types that cannot be used."""
    for option, name in (("-ctk", type_k), ("-ctv", type_v)):
        if name not in CACHE_TYPES:
            raise OrthrusError(f"{option} {name}: expected one of {', '.join(CACHE_TYPES)}")
        qblock, _ = gguf.GGML_QUANT_SIZES[CACHE_TYPES[name]]
        if config.head_dim % qblock:
            raise OrthrusError(
                f"{option} {name}: needs a head size that is a multiple of {qblock}, this model's "
                f"is {config.head_dim}; use f16"
            )
    return CacheLayout(
        CACHE_TYPES[type_k],
        CACHE_TYPES[type_v],
        config.n_layers,
        config.n_head_kv,
        config.head_dim,
    )


def spare_rows(config: ModelConfig) -> int:
    """Cache rows set aside for the diffusion rows of a pass."""
    return max(BLOCK_ROWS, config.block_size or 0)


def cache_rows(capacity: int, spare: int) -> int:
    """Rows of a cache for `capacity` tokens, with `spare` rows for blocks."""
    return -(-(capacity + spare) // COLUMNS) * COLUMNS


def ar_rows(config: ModelConfig, layout: CacheLayout, reach: int, most: int) -> int:
    """AR rows of one pass that sees `reach` cache rows: `most`, or as many as keep its attention
    scores within SCORE_BYTES. Flash attention stores no scores."""
    if not layout.transposed:
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
