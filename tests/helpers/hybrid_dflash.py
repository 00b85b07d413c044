"""A small random DFlash drafter for the small hybrid of `mtp_models.py`, and what it computes, in
numpy.

Next tokens of that model depend mostly on the last one. The drafter's first layer brings the
anchor's embedding into the masks' rows, and the others add little: so it is often right.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from drafters import loaded_pair, stand_in_pair
from hf_checkpoint import Weights, write_safetensors
from hf_hybrid import MLP, VOCAB, WIDTH
from make_file import make_file
from mtp_models import mtp_weights, stock_model
from numpy.typing import NDArray

from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName

LAYERS, HEADS, KV_HEADS, DIM, BLOCK, MASK, THETA = 3, 4, 2, 32, 8, 261, 1e7
#: Behind a DeltaNet layer, before the attention layer, and behind it.
IDS = (0, 2, 3)

CONFIG: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "block_size": BLOCK,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": IDS},
    "head_dim": DIM,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "layer_types": ["full_attention"] * LAYERS,
    "max_position_embeddings": 256,
    "model_type": "qwen3",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "num_target_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
#: As drafters for Qwen3.6 have it, and the same with rows that see ahead.
WINDOW = 10
SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    "sliding_window": WINDOW,
    "use_sliding_window": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": SLIDING,
    "ahead": {**SLIDING, "is_causal": False},
}

Floats = NDArray[np.float64]


@functools.cache
def dflash_weights() -> Weights:
    """By the names of z-lab's checkpoints."""
    rng = np.random.default_rng(8)
    found: dict[str, NDArray[Any]] = {
        "fc.weight": rng.standard_normal((WIDTH, len(IDS) * WIDTH)) / WIDTH**0.5,
        "hidden_norm.weight": 0.04 * rng.standard_normal(WIDTH),
        "norm.weight": 1 + mtp_weights()["model.norm.weight"],
    }
    for i in range(LAYERS):
        own = {
            "self_attn.q_proj": (HEADS * DIM, WIDTH),
            "self_attn.k_proj": (KV_HEADS * DIM, WIDTH),
            "self_attn.v_proj": (KV_HEADS * DIM, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * DIM),
            "mlp.gate_proj": (MLP, WIDTH),
            "mlp.up_proj": (MLP, WIDTH),
            "mlp.down_proj": (WIDTH, MLP),
        }
        for name, shape in own.items():
            scale = 0.3 if name.endswith(("o_proj", "down_proj")) else 1.0
            matrix = scale * rng.standard_normal(shape) / shape[1] ** 0.5
            found[f"layers.{i}.{name}.weight"] = matrix
        for name in ("q_norm", "k_norm"):
            found[f"layers.{i}.self_attn.{name}.weight"] = 1 + 0.3 * rng.standard_normal(DIM)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"layers.{i}.{name}.weight"] = 1 + 0.3 * rng.standard_normal(WIDTH)
    # The first layer's values are what is in a row besides the mask; two of its heads hold halves
    # of a row, and these go to their places.
    norm = found["layers.0.input_layernorm.weight"]
    mask = mtp_weights()["model.embed_tokens.weight"][MASK] * norm
    others = np.eye(WIDTH) - np.outer(mask, mask) / (mask @ mask)
    found["layers.0.self_attn.v_proj.weight"] = others / norm[:, None]
    found["layers.0.self_attn.o_proj.weight"][:] = 0
    for half in range(2):
        at = slice(half * DIM, half * DIM + DIM)
        found["layers.0.self_attn.o_proj.weight"][at, 2 * half * DIM :][:, :DIM] = 150 * np.eye(DIM)
    return {name: values.astype(np.float32) for name, values in found.items()}


def write_dflash(folder: Path, **changes: Any) -> Path:
    """A checkpoint folder; returns it. changes: of CONFIG."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    write_safetensors(folder / "model.safetensors", dflash_weights(), "F32")
    return folder


@functools.cache
def dflash_file(kind: str, type_name: str = "f32") -> Path:
    """The drafter as a GGUF. kind: of KINDS."""
    folder = write_dflash(Path(mkdtemp()) / kind, **KINDS[kind])
    path = folder.with_name(f"{kind}-{type_name}.gguf")
    make_file(folder, path, "--type", type_name, "--target", stock_model())
    return path


@contextmanager
def loaded_dflash(
    runtime: RuntimeName, kind: str = "causal", type_name: str = "f32", **settings: Any
) -> Iterator[ModelWithDrafter]:
    """The model with the drafter beside it; of the CUDA runtime, the stand-ins."""
    file = dflash_file(kind, type_name)
    if runtime is RuntimeName.CUDA:
        from cuda_models import FakeGraphs, small_heads

        pair = stand_in_pair(stock_model(), file, capture=FakeGraphs(), **settings)
        with small_heads(), pair as model:
            yield model
        return
    with loaded_pair(stock_model(), file, runtime, **settings) as model:
        yield model


class NumpyDrafter:
    """The drafter in double precision, from the checkpoint's weights. kind: of KINDS."""

    def __init__(self, kind: str) -> None:
        self._w = {name: values.astype(np.float64) for name, values in dflash_weights().items()}
        target = mtp_weights()
        self._embedding = target["model.embed_tokens.weight"].astype(np.float64)
        self._output = target["lm_head.weight"].astype(np.float64)
        self._kinds = (CONFIG | KINDS[kind])["layer_types"]
        self._causal = kind == "causal"

    def logits(self, taps: Floats, anchor: int) -> Floats:
        """Of a block behind rows, [BLOCK, n_vocab]. taps: theirs, [taps, rows, n_embd]."""
        w, start = self._w, taps.shape[1]
        joined = np.concatenate(list(taps), axis=1)
        features = self._norm(joined @ w["fc.weight"].T, "hidden_norm")
        x = self._embedding[[anchor] + [MASK] * (BLOCK - 1)]
        rows, keys = np.arange(start, start + BLOCK), np.arange(start + BLOCK)
        for i, kind in enumerate(self._kinds):
            layer, hidden = f"layers.{i}.", np.zeros((BLOCK, start + BLOCK), bool)
            if kind == "sliding_attention":
                back = rows[:, None] - keys
                hidden = (back >= WINDOW) | (self._causal & (back < 0))
            h = self._norm(x, f"{layer}input_layernorm")
            both = np.concatenate([features, h])  # features are not normed
            q = self._heads(h, f"{layer}self_attn.q", rows)
            k = self._heads(both, f"{layer}self_attn.k", keys)
            v = (both @ w[f"{layer}self_attn.v_proj.weight"].T).reshape(len(both), -1, DIM)
            k, v = (np.repeat(one, HEADS // KV_HEADS, axis=1) for one in (k, v))
            scores = np.einsum("rhd,nhd->hrn", q, k) / DIM**0.5
            scores = np.exp(np.where(hidden, -np.inf, scores))
            mixed = np.einsum("hrn,nhd->rhd", scores / scores.sum(-1, keepdims=True), v)
            x = x + mixed.reshape(BLOCK, -1) @ w[f"{layer}self_attn.o_proj.weight"].T
            h = self._norm(x, f"{layer}post_attention_layernorm")
            gate, up = (h @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}mlp.down_proj.weight"].T
        found: Floats = self._norm(x, "norm") @ self._output.T
        return found

    def _norm(self, x: Floats, name: str) -> Floats:
        normed: Floats = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return normed * self._w[f"{name}.weight"]

    def _heads(self, h: Floats, name: str, positions: Sequence[int] | NDArray[np.int64]) -> Floats:
        """Normed and turned heads, [rows, heads, DIM]."""
        x = (h @ self._w[f"{name}_proj.weight"].T).reshape(len(h), -1, DIM)
        x = self._norm(x, f"{name}_norm")
        angles = np.multiply.outer(positions, THETA ** (-np.arange(0, DIM, 2) / DIM))[:, None]
        low, high = x[..., : DIM // 2], x[..., DIM // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
