"""What the passes of the native kernels write, besides caches."""

from __future__ import annotations

import numpy as np
from orthrus_cpu_kernels import library as k
from orthrus_cpu_kernels.library import LANES, Kernels

from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cpu.weights import Floats


def _columns(config: ModelConfig) -> dict[str, int]:
    """Columns of the rows of floats that passes write, in whole panels."""
    c = config
    heads, mixed = (c.n_head + 2 * c.n_head_kv) * c.head_dim, c.n_head * c.head_dim
    convolved = 0
    if c.hybrid is not None:
        gates = 2 * -(-c.hybrid.n_value_heads // LANES) * LANES
        convolved = c.hybrid.channels + gates
        heads = max(heads + mixed, convolved + c.hybrid.inner)
        mixed = max(mixed, c.hybrid.inner)
    columns = {
        **dict.fromkeys(("x", "picked", "normed"), c.n_embd),
        "qkv": heads,
        "mixed": mixed,
        "convolved": convolved,
        **dict.fromkeys(("gated", "other"), c.n_ff),
        "logits": c.n_vocab,
    }
    return {name: -(-count // LANES) * LANES for name, count in columns.items()}


def _quantized_bytes(kernels: Kernels, config: ModelConfig) -> list[int]:
    """Bytes of the longest row of activations, by form."""
    inner = 0 if config.hybrid is None else config.hybrid.inner
    widths = (config.n_embd, config.n_head * config.head_dim, config.n_ff, inner)
    return [
        max(kernels.row_bytes(form, width) for width in widths)
        for form in (k.FORM_FLOAT, k.FORM_BLOCK, k.FORM_K)
    ]


def buffer_bytes(kernels: Kernels, config: ModelConfig, rows: int) -> int:
    """Bytes of `Buffers` without taps."""
    row = 4 * sum(_columns(config).values()) + sum(_quantized_bytes(kernels, config))
    attention = config.layer_kinds.count(LayerKind.ATTENTION)
    tables = (k.ROW, k.GROUP, k.STATE_ROW, k.RUN)
    row += 4 + sum(table.itemsize for table in tables) + attention * k.LAYER_CACHE.itemsize
    row += (config.n_layers - attention) * k.LAYER_STATE.itemsize
    return rows * row


class Buffers:
    """What passes write, for up to `rows` rows; and the tables that describe them to the kernels.

    x: the residual stream. picked: of the wanted rows. normed, qkv, convolved, mixed, gated, other:
    floats between steps. logits: [rows, n_vocab, to whole panels]. q: quantized activations, by
    form.
    """

    def __init__(self, kernels: Kernels, config: ModelConfig, rows: int) -> None:
        floats = {
            name: np.zeros((rows, count), np.float32) for name, count in _columns(config).items()
        }
        self.rows = rows
        self.x, self.picked, self.normed = (floats[name] for name in ("x", "picked", "normed"))
        self.qkv, self.mixed, self.logits = (floats[name] for name in ("qkv", "mixed", "logits"))
        self.gated, self.other = floats["gated"], floats["other"]
        self.convolved = floats["convolved"]
        self.row = np.zeros(rows, k.ROW)
        self.group = np.zeros(rows, k.GROUP)
        self.index = np.zeros(rows, np.int32)
        attention = config.layer_kinds.count(LayerKind.ATTENTION)
        self.caches = np.zeros((attention, rows), k.LAYER_CACHE)
        self.states = np.zeros((config.n_layers - attention, rows), k.LAYER_STATE)
        self.state_row = np.zeros(rows, k.STATE_ROW)
        self.run = np.zeros(rows, k.RUN)
        self.q = [np.zeros((rows, size), np.uint8) for size in _quantized_bytes(kernels, config)]
        self.taps: dict[int, Floats] = {}

    def tap(self, layer: int) -> Floats:
        """Where the input of a layer is kept."""
        if layer not in self.taps:
            self.taps[layer] = np.zeros_like(self.x)
        return self.taps[layer]
