"""The memory that a model needs on ggml, from its config alone.

Weights are used where the file's mapping holds them, so they take the size of their tensors. The
cache is exact. Buffers are an upper bound: at most a quarter above what passes were seen to use.
"""

from __future__ import annotations

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cache_layout import (
    BATCH_ROWS,
    COLUMNS,
    CacheLayout,
    cache_rows,
    spare_rows,
)
from orthrus_gguf.runtime.ggml.cache_layout import ar_rows, columns_for, transposed

_PADDING = 1024  # what aligning a graph's tensors costs


def cache_bytes(config: ModelConfig, layout: CacheLayout, context: int) -> int:
    """Bytes of a cache for `context` tokens, with its spare and padding rows."""
    return round(cache_rows(context, spare_rows(config)) * layout.row_bytes())


def buffer_bytes(config: ModelConfig, layout: CacheLayout, context: int) -> int:
    """Bytes that the passes need besides weights and cache, at worst, up to this context."""
    longest = cache_rows(context, spare_rows(config))
    largest, reach = _largest_pass(config, layout, longest), COLUMNS
    while reach < longest:
        largest = max(largest, _largest_pass(config, layout, reach))
        reach = columns_for(reach + 1)
    return largest


def _largest_pass(config: ModelConfig, layout: CacheLayout, reach: int) -> int:
    """The larger of a prompt pass and a fused one (verification and the next draft), when they see
    `reach` cache rows."""
    rows = ar_rows(config, layout, reach, BATCH_ROWS)
    rows, block = min(rows, reach), min(config.block_size or 1, reach)
    draft = block if config.has_heads else 0
    prompt = graph_bytes(config, layout, rows, 0, reach, 1)
    fused = graph_bytes(config, layout, block, draft, reach, block + draft)
    return max(
        prompt + _operand_bytes(config, layout, rows, reach),
        fused + _operand_bytes(config, layout, block, reach),
    )


def graph_bytes(
    config: ModelConfig, layout: CacheLayout, ar: int, diffusion: int, reach: int, wanted: int
) -> int:
    """Bytes of ggml's block of inputs and intermediate results, of which the largest stage counts,
    in a pass of `ar` and `diffusion` rows of the two views. They see `reach` cache rows and give
    `wanted` rows of logits."""
    width, heads, rows = config.n_embd, config.n_head * config.head_dim, ar + diffusion
    scores = config.n_head * reach if transposed(layout) else 0
    attention = max(ar, diffusion) * (scores + 2 * width + 2 * heads)
    if ar and diffusion:
        attention += rows * 2 * width  # what both views share, and the first one's results
    mlp = rows * (3 * config.n_ff + 3 * width)
    head = rows * width + wanted * (config.n_vocab + 2 * width)
    places = config.n_head_kv * config.head_dim if transposed(layout) else 1
    inputs = rows * (2 * reach + 8 * places + 16)
    return _PADDING + inputs + 4 * max(attention, mlp, head)


def _operand_bytes(config: ModelConfig, layout: CacheLayout, rows: int, reach: int) -> int:
    """Bytes of ggml's block of operands converted to the type that the other one asks for (at most
    16 bits per element): `rows` rows of one product, or their scores."""
    heads = config.n_head * config.head_dim
    scores = config.n_head * reach if transposed(layout) else 0
    return 2 * rows * max(scores, config.n_embd, heads, config.n_ff)
