"""What a model is made of: its architecture, RoPE, output and heads, in words and in JSON."""

from __future__ import annotations

from typing import Any

from orthrus_gguf.model.architectures import LayerKind, Pairing
from orthrus_gguf.model.config import ModelConfig, Rope

_PAIRS = {Pairing.HALVES: "halves", Pairing.ADJACENT: "adjacent pairs"}


def anatomy_rows(config: ModelConfig) -> list[tuple[str, str]]:
    """Part and what it is, each in some 60 characters."""
    arch, rope = config.architecture, config.rope
    own = [
        "biases of q, k and v" if arch.qkv_biases else "no biases",
        "norms of q and k" if arch.qk_norms else "no norms of q and k",
        *(["gated"] if arch.hybrid else []),
    ]
    scaling = {
        "none": "",
        "linear": f", linear by {rope.factor:g}",
        "yarn": f", YaRN by {rope.factor:g}",
    }
    factors = ", frequency factors" if rope.freq_factors is not None else ""
    heads = "none"
    if config.has_heads:
        heads = f"for this architecture, blocks of {config.block_size}, mask {config.mask_token}"
    part = "" if config.rotary_dim == config.head_dim else f" of the first {config.rotary_dim}"
    return [
        (
            "base",
            f"{arch.name}, {config.n_layers} layers of {config.n_embd}, MLP {config.n_ff}, "
            f"{config.n_vocab:,} tokens",
        ),
        (
            "attention",
            f"{config.n_head} heads of {config.head_dim} on {config.n_head_kv}, {', '.join(own)}",
        ),
        *_hybrid_rows(config),
        (
            "RoPE",
            f"{_PAIRS[arch.pairing]}{part}, base {rope.freq_base:g}{scaling[_scaling(rope)]}"
            f"{factors}",
        ),
        ("output", "tied to the embedding" if config.tied else "a matrix of its own"),
        ("heads", heads),
    ]


def _hybrid_rows(config: ModelConfig) -> list[tuple[str, str]]:
    """What a hybrid has besides."""
    hybrid = config.hybrid
    if hybrid is None:
        return []
    layers = config.layer_kinds.count(LayerKind.DELTA_NET)
    mib = hybrid.state_bytes(config.n_layers) / 2**20
    return [
        (
            "DeltaNet",
            f"{layers} of the layers, {hybrid.n_key_heads} key and {hybrid.n_value_heads} value "
            f"heads of {hybrid.head_dim}, {mib:.1f} MiB of state",
        ),
        ("MTP", "a block, which drafts" if hybrid.mtp else "no block"),
    ]


def _hybrid_json(config: ModelConfig) -> dict[str, Any] | None:
    hybrid = config.hybrid
    if hybrid is None:
        return None
    return {
        "delta_net_layers": config.layer_kinds.count(LayerKind.DELTA_NET),
        "n_key_heads": hybrid.n_key_heads,
        "n_value_heads": hybrid.n_value_heads,
        "head_dim": hybrid.head_dim,
        "state_bytes": hybrid.state_bytes(config.n_layers),
        "mtp": hybrid.mtp,
    }


def anatomy_json(config: ModelConfig) -> dict[str, Any]:
    """The same in plain JSON types."""
    arch, rope = config.architecture, config.rope
    return {
        "architecture": arch.name,
        "n_layers": config.n_layers,
        "n_embd": config.n_embd,
        "n_ff": config.n_ff,
        "n_head": config.n_head,
        "n_head_kv": config.n_head_kv,
        "head_dim": config.head_dim,
        "n_vocab": config.n_vocab,
        "qk_norms": arch.qk_norms,
        "qkv_biases": arch.qkv_biases,
        "tied": config.tied,
        "hybrid": _hybrid_json(config),
        "rope": {
            "pairing": arch.pairing.value,
            "dimensions": config.rotary_dim,
            "freq_base": rope.freq_base,
            "scaling": _scaling(rope),
            "factor": rope.factor,
            "freq_factors": rope.freq_factors is not None,
        },
        "block_size": config.block_size,
        "mask_token": config.mask_token,
    }


def _scaling(rope: Rope) -> str:
    if rope.ext_factor:
        return "yarn"
    return "none" if rope.factor == 1 else "linear"
