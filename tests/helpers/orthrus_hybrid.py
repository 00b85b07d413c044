"""A small random hybrid with random diffusion heads, and what its views compute, in numpy.

The hybrid is that of `mtp_models.py`: next tokens depend mostly on the last one, so that heads
which are near their originals are often right.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from hf_checkpoint import Weights
from hf_hybrid import write_hybrid
from make_file import make_file
from mtp_models import CONFIG, DIM, HEADS, KV_HEADS, ROTARY, mtp_weights
from numpy.typing import NDArray

MASK, BLOCK = 261, 8
LAYERS = 4
#: As the one published implementation calls it.
HEADS_CONFIG: dict[str, Any] = {
    **CONFIG,
    "block_size": BLOCK,
    "mask_token_id": MASK,
    "model_type": "orthrus_qwen3_5",
}
KEY_HEADS, VALUE_HEADS, SIZE = 2, 4, 16
KEYS, INNER = KEY_HEADS * SIZE, VALUE_HEADS * SIZE

Floats = NDArray[np.float64]


def twin_of(name: str) -> str:
    """What checkpoints call the diffusion view's own."""
    stem, dot, _ = name.rpartition(".weight")
    return f"{stem}_diff.weight" if dot else f"{name}_diff"


@functools.cache
def heads_weights(spread: float = 0.2) -> Weights:
    """Base and heads, those as far from their originals as `spread` says; without MTP block."""
    rng = np.random.default_rng(4)
    base = {name: w for name, w in mtp_weights().items() if not name.startswith("mtp.")}
    twins = {}
    for name, w in base.items():
        if ".self_attn." in name or ".linear_attn." in name:
            noise = rng.standard_normal(w.shape) * np.abs(w).mean()
            twins[twin_of(name)] = (w + spread * noise).astype(np.float32)
    return base | twins


@functools.cache
def heads_model(type_name: str = "f32", *, mtp: bool = False, spread: float = 0.2) -> Path:
    """Base and heads in one file. mtp: with the base's MTP block."""
    block = {name: w for name, w in mtp_weights().items() if name.startswith("mtp.") and mtp}
    folder = Path(mkdtemp()) / "heads"
    write_hybrid(folder, HEADS_CONFIG, heads_weights(spread) | block, dtype="F32")
    path = folder.with_suffix(".gguf")
    make_file(folder, path, "--type", type_name)
    return path


@dataclass
class Known:
    """What a text has left behind: keys and values of the attention layer; per DeltaNet layer its
    state [value heads, key, value] and the rows that the convolution looks back on."""

    keys: list[Floats] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)
    states: list[Floats] = field(default_factory=list)
    windows: list[Floats] = field(default_factory=list)


class NumpyHybrid:
    """Both views in double precision, from the checkpoint's weights, row by row."""

    def __init__(self, spread: float = 0.2) -> None:
        self._w = {name: w.astype(np.float64) for name, w in heads_weights(spread).items()}

    def read(self, tokens: Sequence[int]) -> tuple[Floats, Known]:
        """Logits of all rows of a text, and what it leaves behind."""
        known = Known(
            states=[np.zeros((VALUE_HEADS, SIZE, SIZE))] * 3,
            windows=[np.zeros((3, 2 * KEYS + INNER))] * 3,
        )
        rows = [self._row(token, known) for token in tokens]
        return np.array(rows), known

    def _row(self, token: int, known: Known) -> Floats:
        x = self._w["model.embed_tokens.weight"][token][None]
        for layer in range(LAYERS):
            h = self._normed(x, f"model.layers.{layer}.input_layernorm")
            x = x + self._mixed(h, layer, known, len(known.keys), "")
            x = x + self._mlp(x, layer)
        found: Floats = self._logits(x)[0]
        return found

    def block(self, known: Known, start: int, anchor: int) -> Floats:
        """Logits of a block [BLOCK, n_vocab] behind a text of `start` tokens, which stays as it
        is."""
        x = self._w["model.embed_tokens.weight"][[anchor] + [MASK] * (BLOCK - 1)]
        own = Known(
            known.keys[:], known.values[:], [s.copy() for s in known.states], list(known.windows)
        )
        for layer in range(LAYERS):
            h = self._normed(x, f"model.layers.{layer}.input_layernorm")
            x = x + self._mixed(h, layer, own, start, "_diff")
            x = x + self._mlp(x, layer)
        return self._logits(x)

    def _mixed(self, h: Floats, layer: int, known: Known, start: int, twin: str) -> Floats:
        if layer == LAYERS - 1:
            return self._attention(h, f"model.layers.{layer}.self_attn", known, start, twin)
        rows = [
            self._delta_net(row, f"model.layers.{layer}.linear_attn", known, layer, twin)
            for row in h
        ]
        return np.array(rows)

    def _attention(self, h: Floats, name: str, known: Known, start: int, twin: str) -> Floats:
        """All rows see what is known and one another."""
        both = (h @ self._w[f"{name}.q_proj{twin}.weight"].T).reshape(len(h), HEADS, 2 * DIM)
        q, gate = both[..., :DIM], both[..., DIM:]
        k, v = (
            (h @ self._w[f"{name}.{part}_proj{twin}.weight"].T).reshape(len(h), KV_HEADS, DIM)
            for part in "kv"
        )
        positions = np.arange(start, start + len(h))
        q = self._turned(self._normed(q, f"{name}.q_norm{twin}"), positions)
        k = self._turned(self._normed(k, f"{name}.k_norm{twin}"), positions)
        known.keys += list(k)
        known.values += list(v)
        keys, values = (np.repeat(part, 2, axis=1) for part in (known.keys, known.values))
        scores = np.exp(np.einsum("rhd,thd->hrt", q, keys) / DIM**0.5)
        mixed = np.einsum("hrt,thd->rhd", scores / scores.sum(-1, keepdims=True), values)
        gated = (mixed / (1 + np.exp(-gate))).reshape(len(h), -1)
        found: Floats = gated @ self._w[f"{name}.o_proj{twin}.weight"].T
        return found

    def _delta_net(self, h: Floats, name: str, known: Known, layer: int, twin: str) -> Floats:
        """One row, which changes the state."""

        def own(part: str) -> Any:
            return self._w[f"{name}.{part}{twin}.weight"]

        row = own("in_proj_qkv") @ h
        window = np.concatenate([known.windows[layer], row[None]])
        known.windows[layer] = window[1:]
        u = (own("conv1d")[:, 0].T * window).sum(0)
        u = u / (1 + np.exp(-u))
        q, k = (part.reshape(KEY_HEADS, SIZE) for part in (u[:KEYS], u[KEYS : 2 * KEYS]))
        v = u[2 * KEYS :].reshape(VALUE_HEADS, SIZE)
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        q, k = (np.repeat(x, VALUE_HEADS // KEY_HEADS, axis=0) for x in (q / SIZE**0.5, k))
        beta = 1 / (1 + np.exp(-own("in_proj_b") @ h))
        rate = np.exp(self._w[f"{name}.A_log{twin}"])
        step = np.log1p(np.exp(own("in_proj_a") @ h + self._w[f"{name}.dt_bias{twin}"]))
        state = known.states[layer] * np.exp(-rate * step)[:, None, None]
        delta = beta[:, None] * (v - np.einsum("hij,hi->hj", state, k))
        state = known.states[layer] = state + k[:, :, None] * delta[:, None]
        out = np.einsum("hij,hi->hj", state, q)
        z = (own("in_proj_z") @ h).reshape(VALUE_HEADS, SIZE)
        out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6) * own("norm")
        found: Floats = own("out_proj") @ (out * z / (1 + np.exp(-z))).ravel()
        return found

    def _mlp(self, x: Floats, layer: int) -> Floats:
        name = f"model.layers.{layer}"
        h = self._normed(x, f"{name}.post_attention_layernorm")
        gate, up = (h @ self._w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        found: Floats = (gate / (1 + np.exp(-gate)) * up) @ self._w[
            f"{name}.mlp.down_proj.weight"
        ].T
        return found

    def _logits(self, x: Floats) -> Floats:
        found: Floats = self._normed(x, "model.norm") @ self._w["lm_head.weight"].T
        return found

    def _normed(self, x: Floats, name: str) -> Floats:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        found: Floats = x / scale * (1 + self._w[f"{name}.weight"])
        return found

    @staticmethod
    def _turned(x: Floats, positions: NDArray[np.int64]) -> Floats:
        half = ROTARY // 2
        angles = np.multiply.outer(positions, 1e7 ** (-np.arange(half) / half))[:, None]
        low, high, cos, sin = x[..., :half], x[..., half:ROTARY], np.cos(angles), np.sin(angles)
        turned = [low * cos - high * sin, high * cos + low * sin, x[..., ROTARY:]]
        return np.concatenate(turned, axis=-1)
