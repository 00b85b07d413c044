"""Sliding windows: layers of a drafter whose rows see the last positions only."""

from __future__ import annotations

import gguf
import numpy as np

from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.fields import Fields, describe
from orthrus_gguf.model.config import MAX_CONTEXT, ModelConfig
from orthrus_gguf.records import dataclass


@dataclass(frozen=True)
class Window:
    """What the rows of blocks see in some layers.

    size: positions, a row's own the last. layers: for every layer whether it is one of them.
    causal: there, rows do not see those behind them in their block.
    """

    size: int
    layers: tuple[bool, ...]
    causal: bool


def read_window(fields: Fields, config: ModelConfig) -> Window | None:
    """What a drafter's file says, checked; None where every row sees everything.

    Where it does not say whether attention is causal, sliding layers are, as in z-lab's
    implementation. Raises OrthrusError.
    """
    attention = gguf.Keys.Attention
    key, pattern_key, causal_key = (
        keys.model_key(template, config.architecture.name)
        for template in (
            attention.SLIDING_WINDOW,
            attention.SLIDING_WINDOW_PATTERN,
            attention.CAUSAL,
        )
    )
    causal = fields.metadata.get(causal_key)
    if causal is not None and causal is not False:
        raise fields.error(
            causal_key,
            f"{describe(causal)} is not supported",
            "drafters whose full-attention layers are causal cannot run here",
        )
    size = fields.integer(key, 0, MAX_CONTEXT, 0)
    pattern = fields.metadata.get(pattern_key)
    if not size:
        if pattern is not None:
            raise fields.error(key, f"is missing, and yet there is {pattern_key}")
        return None
    layers = pattern.tolist() if isinstance(pattern, np.ndarray) and pattern.ndim == 1 else None
    if layers is None or len(layers) != config.n_layers or any(one not in (0, 1) for one in layers):
        raise fields.error(
            pattern_key,
            f"expected a yes or no for each of {config.n_layers} layers, found"
            f" {'nothing' if pattern is None else describe(pattern)}",
        )
    block = config.block_size or 0
    if size < block:
        raise fields.error(key, f"expected at least the {block} rows of a block, found {size}")
    if not any(layers):
        return None
    return Window(size, tuple(map(bool, layers)), causal is None)
