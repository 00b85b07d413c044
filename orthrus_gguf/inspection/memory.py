"""The memory that a model needs on the CPU runtime, from its config alone.

Weights are used where the file's mapping holds them, so they take the size of their tensors. The
cache is exact. Buffers are an upper bound: at most a quarter above what passes were seen to use.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from orthrus_gguf.config import ModelConfig
from orthrus_gguf.errors import OrthrusError

_TYPES = gguf.GGMLQuantizationType

#: What `-ctk` and `-ctv` accept.
CACHE_TYPES = {"f32": _TYPES.F32, "f16": _TYPES.F16, "q8_0": _TYPES.Q8_0, "q4_0": _TYPES.Q4_0}

#: Constants of the CPU runtime (runtime/ggml): cache rows come in multiples of ROW_STEP and include
#: SPARE_ROWS for diffusion blocks; a prompt pass has BATCH_ROWS rows, and in long contexts only as
#: many (but at least MIN_ROWS) as keep its attention scores within SCORE_BYTES.
ROW_STEP = 64
SPARE_ROWS = 128
BATCH_ROWS = 128
MIN_ROWS = 32
SCORE_BYTES = 32 << 20
_PADDING = 1024  # what aligning a graph's tensors costs


@dataclass(frozen=True)
class CacheType:
    """Types of the cached keys and values."""

    k: gguf.GGMLQuantizationType
    v: gguf.GGMLQuantizationType

    @property
    def scores_are_stored(self) -> bool:
        """Whether attention goes through a matrix of scores: not where values are quantized."""
        return self.v in (_TYPES.F32, _TYPES.F16)


def cache_type(config: ModelConfig, k: str, v: str) -> CacheType:
    """The types of these names. Raises OrthrusError for types that the model cannot use."""
    for option, name in (("-ctk", k), ("-ctv", v)):
        if name not in CACHE_TYPES:
            raise OrthrusError(f"{option} {name}: expected one of {', '.join(CACHE_TYPES)}")
        qblock, _ = gguf.GGML_QUANT_SIZES[CACHE_TYPES[name]]
        if config.head_dim % qblock:
            raise OrthrusError(
                f"{option} {name}: needs a head size that is a multiple of {qblock}, this model's "
                f"is {config.head_dim}; use f16"
            )
    return CacheType(CACHE_TYPES[k], CACHE_TYPES[v])


def row_bytes(config: ModelConfig, types: CacheType) -> float:
    """Bytes of one token in the cache: keys and values of all layers."""
    per_element = 0.0
    for qtype in (types.k, types.v):
        qblock, size = gguf.GGML_QUANT_SIZES[qtype]
        per_element += size / qblock
    return config.n_layers * config.n_head_kv * config.head_dim * per_element


def cache_bytes(config: ModelConfig, types: CacheType, context: int) -> int:
    """Bytes of a cache for `context` tokens, with its spare and padding rows."""
    return round(cache_rows(config, context) * row_bytes(config, types))


def cache_rows(config: ModelConfig, context: int) -> int:
    """Rows that a cache for `context` tokens has."""
    return _round_up(context + max(SPARE_ROWS, config.block_size or 0), ROW_STEP)


def buffer_bytes(config: ModelConfig, types: CacheType, context: int) -> int:
    """Bytes that the passes need besides weights and cache, at worst, up to this context."""
    longest = cache_rows(config, context)
    largest, reach = _largest_pass(config, types, longest), ROW_STEP
    while reach < longest:
        largest = max(largest, _largest_pass(config, types, reach))
        reach += max(ROW_STEP, 1 << (reach.bit_length() - 4))  # the runtime's own steps
    return largest


def _largest_pass(config: ModelConfig, types: CacheType, reach: int) -> int:
    """The larger of a prompt pass and a fused one (verification and the next draft), when they see
    `reach` cache rows."""
    rows = BATCH_ROWS
    if types.scores_are_stored:
        fitting = SCORE_BYTES // (reach * config.n_head * 4)
        rows = min(rows, max(fitting // MIN_ROWS * MIN_ROWS, MIN_ROWS))
    rows, block = min(rows, reach), min(config.block_size or 1, reach)
    draft = block if config.has_heads else 0
    return max(
        graph_bytes(config, types, rows, 0, reach, 1) + _operand_bytes(config, types, rows, reach),
        graph_bytes(config, types, block, draft, reach, block + draft)
        + _operand_bytes(config, types, block, reach),
    )


def graph_bytes(
    config: ModelConfig, types: CacheType, ar: int, diffusion: int, reach: int, wanted: int
) -> int:
    """Bytes of ggml's block of inputs and intermediate results, of which the largest stage counts,
    in a pass of `ar` and `diffusion` rows of the two views. They see `reach` cache rows and give
    `wanted` rows of logits."""
    width, heads, rows = config.n_embd, config.n_head * config.head_dim, ar + diffusion
    scores = config.n_head * reach if types.scores_are_stored else 0
    attention = max(ar, diffusion) * (scores + 2 * width + 2 * heads)
    if ar and diffusion:
        attention += rows * 2 * width  # what both views share, and the first one's results
    mlp = rows * (3 * config.n_ff + 3 * width)
    head = rows * width + wanted * (config.n_vocab + 2 * width)
    places = config.n_head_kv * config.head_dim if types.scores_are_stored else 1
    inputs = rows * (2 * reach + 8 * places + 16)
    return _PADDING + inputs + 4 * max(attention, mlp, head)


def _operand_bytes(config: ModelConfig, types: CacheType, rows: int, reach: int) -> int:
    """Bytes of ggml's block of operands converted to the type that the other one asks for (at most
    16 bits per element): `rows` rows of one product, or their scores."""
    heads = config.n_head * config.head_dim
    scores = config.n_head * reach if types.scores_are_stored else 0
    return 2 * rows * max(scores, config.n_embd, heads, config.n_ff)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
