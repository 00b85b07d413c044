"""Architectures: what a layer has, as data that runtimes, converter, inspector and predictor read.

Adding one that differs from these only in what `Architecture` says is a record here, and one in
the converter (`hf_config.py`) if it is to be made from Hugging Face checkpoints.
"""

from __future__ import annotations

from enum import Enum

from orthrus_gguf.records import dataclass


class Pairing(Enum):
    """Which elements of a head RoPE turns together.

    HALVES: i and i + head_dim / 2 (NeoX). ADJACENT: 2i and 2i + 1 (llama.cpp's "norm"; converters
    permute the rows of q and k so that it computes what Hugging Face's halves do).
    """

    HALVES = "halves"
    ADJACENT = "adjacent"


class LayerKind(Enum):
    """What mixes the rows of a layer."""

    ATTENTION = "attention"
    DELTA_NET = "gated DeltaNet"


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture` of stock GGUF files.

    qk_norms: RMSNorm on the heads of q and k (`attn_q_norm`, `attn_k_norm`).
    qkv_biases: `attn_q`, `attn_k` and `attn_v` have biases.
    freq_base: RoPE's, where a file does not say; None if it must.
    hybrid: most layers are no attention but a gated DeltaNet (`hybrid.py`); where there is
    attention, `attn_q` holds a gate for each head's output beside its query.
    mlp_norm: what the norm before the MLP is called.
    """

    name: str
    qk_norms: bool
    qkv_biases: bool
    pairing: Pairing
    freq_base: float | None = None
    hybrid: bool = False
    mlp_norm: str = "ffn_norm"


QWEN3 = Architecture("qwen3", qk_norms=True, qkv_biases=False, pairing=Pairing.HALVES)
QWEN2 = Architecture("qwen2", qk_norms=False, qkv_biases=True, pairing=Pairing.HALVES)
LLAMA = Architecture(
    "llama", qk_norms=False, qkv_biases=False, pairing=Pairing.ADJACENT, freq_base=10_000.0
)
QWEN35 = Architecture(
    "qwen35",
    qk_norms=True,
    qkv_biases=False,
    pairing=Pairing.HALVES,
    hybrid=True,
    mlp_norm="post_attention_norm",
)

#: Of a drafter's network (`drafter.py`): what Qwen3 has, but no model by itself.
DFLASH = Architecture("dflash", qk_norms=True, qkv_biases=False, pairing=Pairing.HALVES)

ARCHITECTURES = {arch.name: arch for arch in (QWEN3, QWEN2, LLAMA, QWEN35)}

#: Architectures that look like one of them, and what sets those apart.
RELATIVES = {
    "qwen35moe": "Qwen3.5 with experts",
    "qwen3next": "Qwen3-Next, with experts and other projections",
    "qwen4exp": "a hybrid of another kind",
}
