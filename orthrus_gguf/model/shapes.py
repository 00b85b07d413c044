"""Shapes of released models, with the diffusion heads of their Orthrus versions, or such as they
would have; hybrids without.

For what needs a shape and no weights: synthetic files and predictions. Models that are run get
their shape from their file.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from orthrus_gguf.model.architectures import LLAMA, QWEN2, QWEN35
from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.model.hybrid import Hybrid
from orthrus_gguf.model.rope_factors import llama3_factors

N_VOCAB = 151_936
MASK_TOKEN = 151_669
BLOCK_SIZE = 32


def _eps(value: float) -> float:
    """As a GGUF keeps it."""
    return float(np.float32(value))


def _qwen3(
    name: str, *, layers: int, width: int, mlp: int, heads: int, tied: bool = True
) -> ModelConfig:
    """What differs between the sizes; the rest is common to all of them (their config.json)."""
    return ModelConfig(
        name=name,
        n_layers=layers,
        n_ctx_train=40_960,
        n_embd=width,
        n_ff=mlp,
        n_head=heads,
        n_head_kv=8,
        head_dim=128,
        n_vocab=N_VOCAB,
        rms_eps=_eps(1e-6),
        rope=Rope(1e6),
        tied=tied,
        block_size=BLOCK_SIZE,
        mask_token=MASK_TOKEN,
    )


def _qwen35(
    name: str,
    *,
    layers: int,
    width: int,
    mlp: int,
    heads: tuple[int, int],
    values: int,
    keys: int = 16,
    vocab: int = 248_320,
) -> ModelConfig:
    """A hybrid, without heads and without its MTP block. values, keys: heads of a DeltaNet."""
    return ModelConfig(
        name=name,
        n_layers=layers,
        n_ctx_train=262_144,
        n_embd=width,
        n_ff=mlp,
        n_head=heads[0],
        n_head_kv=heads[1],
        head_dim=256,
        n_vocab=vocab,
        rms_eps=_eps(1e-6),
        rope=Rope(1e7),
        tied=layers < 32 or width < 4096,
        block_size=None,
        mask_token=None,
        architecture=QWEN35,
        hybrid=Hybrid(keys, values, 128, rotary_dim=64, sections=(11, 11, 10, 0)),
    )


def _with_mtp(shape: ModelConfig) -> ModelConfig:
    assert shape.hybrid is not None
    hybrid = replace(shape.hybrid, mtp=True)
    return replace(shape, name=f"{shape.name} with MTP", hybrid=hybrid)


_QWEN2_5_0_5B = ModelConfig(
    name="Qwen2.5-0.5B",
    n_layers=24,
    n_ctx_train=32_768,
    n_embd=896,
    n_ff=4864,
    n_head=14,
    n_head_kv=2,
    head_dim=64,
    n_vocab=N_VOCAB,
    rms_eps=_eps(1e-6),
    rope=Rope(1e6),
    tied=True,
    block_size=BLOCK_SIZE,
    mask_token=MASK_TOKEN,
    architecture=QWEN2,
)
_LLAMA_3_2_1B = ModelConfig(
    name="Llama-3.2-1B",
    n_layers=16,
    n_ctx_train=131_072,
    n_embd=2048,
    n_ff=8192,
    n_head=32,
    n_head_kv=8,
    head_dim=64,
    n_vocab=128_256,
    rms_eps=_eps(1e-5),
    rope=Rope(5e5, freq_factors=llama3_factors(5e5, 64, 32.0, 1.0, 4.0, 8192)),
    tied=True,
    block_size=BLOCK_SIZE,
    mask_token=128_255,
    architecture=LLAMA,
)
_SMOLLM2_135M = ModelConfig(
    name="SmolLM2-135M",
    n_layers=30,
    n_ctx_train=8192,
    n_embd=576,
    n_ff=1536,
    n_head=9,
    n_head_kv=3,
    head_dim=64,
    n_vocab=49_152,
    rms_eps=_eps(1e-5),
    rope=Rope(1e5),
    tied=True,
    block_size=BLOCK_SIZE,
    mask_token=49_151,
    architecture=LLAMA,
)

#: By the name that `orthrus-convert --synthetic` takes: with heads,
SHAPES = {
    "qwen3-0.6b": _qwen3("Qwen3-0.6B", layers=28, width=1024, mlp=3072, heads=16),
    "qwen3-1.7b": _qwen3("Qwen3-1.7B", layers=28, width=2048, mlp=6144, heads=16),
    "qwen3-4b": _qwen3("Qwen3-4B", layers=36, width=2560, mlp=9728, heads=32),
    "qwen3-8b": _qwen3("Qwen3-8B", layers=36, width=4096, mlp=12_288, heads=32, tied=False),
    "qwen2.5-0.5b": _QWEN2_5_0_5B,
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "smollm2-135m": _SMOLLM2_135M,
}

_HYBRIDS = {
    # None that was released: to try hybrids with, its heads as large as theirs.
    "qwen3.5-tiny": _qwen35(
        "Qwen3.5-tiny", layers=4, width=256, mlp=512, heads=(4, 2), values=4, keys=2, vocab=4096
    ),
    "qwen3.5-0.8b": _qwen35(
        "Qwen3.5-0.8B", layers=24, width=1024, mlp=3584, heads=(8, 2), values=16
    ),
    "qwen3.5-2b": _qwen35("Qwen3.5-2B", layers=24, width=2048, mlp=6144, heads=(8, 2), values=16),
    "qwen3.5-4b": _qwen35("Qwen3.5-4B", layers=32, width=2560, mlp=9216, heads=(16, 4), values=32),
    "qwen3.5-9b": _qwen35(
        "Qwen3.5-9B", layers=32, width=4096, mlp=12_288, heads=(16, 4), values=32
    ),
    "qwen3.6-27b": _qwen35(
        "Qwen3.6-27B", layers=64, width=5120, mlp=17_408, heads=(24, 4), values=48
    ),
}

#: and without; also with an MTP block, under `NAME-mtp`.
HYBRID_SHAPES = _HYBRIDS | {f"{name}-mtp": _with_mtp(shape) for name, shape in _HYBRIDS.items()}
