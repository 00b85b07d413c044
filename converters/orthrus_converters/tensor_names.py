"""Which weight of the checkpoint becomes which tensor of the file, and the check that all fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from orthrus_converters import hf_qwen35
from orthrus_converters.checkpoint import Checkpoint
from orthrus_converters.source_tensor import FLOAT_DTYPES, SourceTensor, read_chunks
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import Pairing
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.tensors import (
    MTP_NORM,
    OUTPUT,
    OUTPUT_NORM,
    ROPE_FREQS,
    TOKEN_EMBD,
    base_tensors,
    diffusion_tensors,
    optional_tensors,
)

_GLOBAL = {
    TOKEN_EMBD: "model.embed_tokens.weight",
    OUTPUT: "lm_head.weight",
    OUTPUT_NORM: "model.norm.weight",
}
#: Parts of a layer in their order in the file; a weight stands before its bias.
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_diff": "self_attn.q_proj_diff",
    "attn_k_diff": "self_attn.k_proj_diff",
    "attn_v_diff": "self_attn.v_proj_diff",
    "attn_output_diff": "self_attn.o_proj_diff",
    "attn_q_norm_diff": "self_attn.q_norm_diff",
    "attn_k_norm_diff": "self_attn.k_norm_diff",
}
#: What stands in layers, in the order of the file.
_ORDER = [*LAYER_PARTS, *hf_qwen35.PARTS, *hf_qwen35.MTP_PARTS]
_LM_HEAD = _GLOBAL[OUTPUT]
_COMPARED = 1 << 20  # elements at a time


def has_heads(checkpoint: Checkpoint) -> bool:
    """True if the checkpoint holds any weight of the diffusion view."""
    return any(name.endswith("_diff.weight") for name in checkpoint.tensors)


def match_weights(
    checkpoint: Checkpoint, config: ModelConfig, *, heads_only: bool = False
) -> dict[str, SourceTensor]:
    """All weights by their names in the file, in its order: what is computed, embedding, output,
    layers, final norm. Rows of q and k are paired as the architecture asks.

    heads_only: weights of the AR view may be missing. Raises OrthrusError unless the checkpoint
    holds exactly the weights that `config` calls for, in the right shapes and in types that we
    read.
    """
    heads = diffusion_tensors(config) if config.has_heads else {}
    shapes = base_tensors(config) | heads
    if config.n_blocks > config.n_layers:
        name = f"blk.{config.n_layers}.{MTP_NORM}"
        shapes[name] = optional_tensors(config)[name]
    computed = {ROPE_FREQS: _rope_freqs(checkpoint, config)} if ROPE_FREQS in shapes else {}
    stored = [name for name in shapes if name not in computed]
    mtp_layer = None if config.n_blocks == config.n_layers else config.n_layers
    names = {name: _hf_name(name, mtp_layer) for name in sorted(stored, key=_position)}
    missing = [
        hf_name
        for name, hf_name in names.items()
        if hf_name not in checkpoint.tensors and (name in heads or not heads_only)
    ]
    if missing:
        raise OrthrusError(
            f"{checkpoint.folder}: weight {missing[0]}{_more(missing)} is missing; "
            "the checkpoint is incomplete, or config.json belongs to another model"
        )
    _check_unused(checkpoint, config, set(names.values()))
    weights = {
        name: checkpoint.tensors[hf_name]
        for name, hf_name in names.items()
        if hf_name in checkpoint.tensors
    }
    if config.hybrid is not None:
        weights = {name: hf_qwen35.squeezed(_within(name), w) for name, w in weights.items()}
    for name, source in weights.items():
        check_weight(source, shapes[name])
    if config.hybrid is not None:
        order, hybrid = hf_qwen35.as_ggml_has_it, config.hybrid
        weights = {name: order(_within(name), w, hybrid) for name, w in weights.items()}
    if config.architecture.pairing is Pairing.ADJACENT:
        weights = {name: _paired(name, source, config) for name, source in weights.items()}
    return computed | weights


def _rope_freqs(checkpoint: Checkpoint, config: ModelConfig) -> SourceTensor:
    """The factors that config.json asks for, as a tensor."""
    values = config.rope.freq_factors
    assert values is not None
    path = checkpoint.folder / "config.json"
    return SourceTensor(ROPE_FREQS, "F32", (len(values),), path, 0, 4 * len(values), values=values)


def _paired(name: str, source: SourceTensor, config: ModelConfig) -> SourceTensor:
    """With the heads of q and k as RoPE on adjacent pairs needs them."""
    part = name.split(".")[-2]
    heads = {"attn_q": config.n_head, "attn_k": config.n_head_kv}
    return replace(source, paired_heads=heads.get(part.removesuffix("_diff"), 0))


def _within(name: str) -> str:
    """The name within a layer; of what stands in none, the name."""
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def _hf_name(name: str, mtp_layer: int | None = None) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    within, layer = _within(name), name.split(".")[1]
    if within in hf_qwen35.MTP_PARTS:
        return hf_qwen35.MTP_PARTS[within]
    prefix = f"model.layers.{layer}." if int(layer) != mtp_layer else hf_qwen35.MTP_LAYER
    if within in hf_qwen35.PARTS:
        return prefix + hf_qwen35.PARTS[within]
    part, kind = within.split(".")
    return f"{prefix}{LAYER_PARTS[part]}.{kind}"


def _position(name: str) -> tuple[int, int, int, str]:
    """Sort key: where a tensor stands in the file."""
    if not name.startswith("blk."):
        return 2 * (name == OUTPUT_NORM), list(_GLOBAL).index(name), 0, ""
    within, layer = _within(name), int(name.split(".")[1])
    if within in _ORDER:
        return 1, layer, _ORDER.index(within), ""
    part, kind = within.split(".")
    return 1, layer, _ORDER.index(part), "" if kind == "weight" else kind


def _check_unused(checkpoint: Checkpoint, config: ModelConfig, used: set[str]) -> None:
    """Raise OrthrusError if ignoring the weights that have no place would change the model."""
    unused = [
        name
        for name in checkpoint.tensors
        # Computed from config.json; old versions of transformers stored it.
        if name not in used
        and not name.endswith(".rotary_emb.inv_freq")
        and checkpoint.tensors[name].n_elements
    ]
    if config.tied and {_LM_HEAD, _GLOBAL[TOKEN_EMBD]} <= set(checkpoint.tensors):
        _check_tied(checkpoint.tensors)
        unused.remove(_LM_HEAD)
    if unused:
        raise OrthrusError(
            f"{checkpoint.tensors[unused[0]].path}: weight {unused[0]}{_more(unused)} has no place "
            f"in a model of architecture {config.architecture.name}; the checkpoint is of another"
        )


def _check_tied(tensors: Mapping[str, SourceTensor]) -> None:
    """Raise OrthrusError unless the stored head is the copy of the embedding that it should be."""
    head, embedding = tensors[_LM_HEAD], tensors[_GLOBAL[TOKEN_EMBD]]
    check_weight(head, embedding.shape)
    check_weight(embedding, embedding.shape)
    chunks = zip(read_chunks(head, _COMPARED), read_chunks(embedding, _COMPARED), strict=True)
    if head.dtype != embedding.dtype or not all(np.array_equal(a, b) for a, b in chunks):
        raise OrthrusError(
            f"{head.path}: {_LM_HEAD} differs from the embedding though config.json says "
            "tie_word_embeddings; set it to false if the head is meant to be used"
        )


def check_weight(source: SourceTensor, shape: tuple[int, ...]) -> None:
    """Raise OrthrusError unless a weight is there, in this shape and in a type that we read."""
    if not source.n_elements:
        raise OrthrusError(
            f"{source.path}: weight {source.name} is empty: training with DeepSpeed's ZeRO-3 "
            "leaves such files where the parts of the weights were not gathered; gather them with "
            "its zero_to_fp32.py, or save with stage3_gather_16bit_weights_on_model_save"
        )
    if source.shape != shape:
        raise OrthrusError(
            f"{source.path}: weight {source.name}: expected shape {shape}, found {source.shape}; "
            "config.json belongs to another model"
        )
    if source.dtype not in FLOAT_DTYPES:
        raise OrthrusError(
            f"{source.path}: weight {source.name}: expected {', '.join(FLOAT_DTYPES)}, found "
            f"{source.dtype}; get the checkpoint in one of these types"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
