"""The shapes of the released Qwen3 models, with the diffusion heads of their Orthrus versions.

For what needs a shape and no weights: synthetic files and predictions. Models that are run get
their shape from their file.
"""

from __future__ import annotations

import numpy as np

from orthrus_gguf.model.config import ModelConfig, Rope

N_VOCAB = 151_936
MASK_TOKEN = 151_669
BLOCK_SIZE = 32


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
        rms_eps=float(np.float32(1e-6)),
        rope=Rope(1e6),
        tied=tied,
        block_size=BLOCK_SIZE,
        mask_token=MASK_TOKEN,
    )


#: By the name that `orthrus-bench --synthetic` takes.
QWEN3_SHAPES = {
    "qwen3-0.6b": _qwen3("Qwen3-0.6B", layers=28, width=1024, mlp=3072, heads=16),
    "qwen3-1.7b": _qwen3("Qwen3-1.7B", layers=28, width=2048, mlp=6144, heads=16),
    "qwen3-4b": _qwen3("Qwen3-4B", layers=36, width=2560, mlp=9728, heads=32),
    "qwen3-8b": _qwen3("Qwen3-8B", layers=36, width=4096, mlp=12_288, heads=32, tied=False),
}
