"""Types and sizes of key/value caches on the CPU, and how many rows a pass has there.

Shared by the runtimes, which allocate, and by `orthrus-inspect`, which only says how much.
"""

from __future__ import annotations

import gguf

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.records import dataclass

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


@dataclass(frozen=True)
class CacheLayout:
    """Types and sizes of a cache, in elements. How they lie is each runtime's own.

    n_layers: that keep keys and values.
    """

    type_k: gguf.GGMLQuantizationType
    type_v: gguf.GGMLQuantizationType
    n_layers: int
    n_head_kv: int
    head_dim: int

    @property
    def kv_dim(self) -> int:
        """Elements of one row's keys, and of its values, in one layer."""
        return self.n_head_kv * self.head_dim

    @property
    def words(self) -> str:
        """The types: `f16/q8_0`."""
        return f"{self.type_k.name.lower()}/{self.type_v.name.lower()}"

    def row_bytes(self) -> float:
        """Bytes that one row takes over all layers, keys and values."""
        sizes = [gguf.GGML_QUANT_SIZES[qtype] for qtype in (self.type_k, self.type_v)]
        return self.n_layers * self.kv_dim * sum(size / block for block, size in sizes)

    def too_large(self, capacity: int, rows: int, n_bytes: int, available: int) -> OrthrusError:
        """The error of a cache of `rows` rows that does not fit the machine's memory."""
        per_element = self.row_bytes() / (self.n_layers * self.kv_dim)
        return OrthrusError(
            f"a context of {capacity} tokens does not fit: {self.n_layers} layers x "
            f"{self.n_head_kv} key/value heads x {self.head_dim} elements x "
            f"{per_element:g} bytes ({self.words}) x {rows} rows "
            f"= {n_bytes / 2**30:.1f} GiB, this machine has {available / 2**30:.1f} GiB; "
            "choose a smaller one with -c, or smaller cache types with -ctk and -ctv"
        )


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
        config.layer_kinds.count(LayerKind.ATTENTION),
        config.n_head_kv,
        config.head_dim,
    )


def spare_rows(config: ModelConfig) -> int:
    """Cache rows set aside for the diffusion rows of a pass."""
    return max(BLOCK_ROWS, config.block_size or 0)


def cache_rows(capacity: int, spare: int) -> int:
    """Rows of a cache for `capacity` tokens, with `spare` rows for blocks, in whole groups."""
    return -(-(capacity + spare) // COLUMNS) * COLUMNS
