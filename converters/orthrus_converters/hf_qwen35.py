"""What is particular to checkpoints of Qwen3.5 and 3.6: nested configs, other names, other values.

Their norms are stored without the 1 that they are multiplied by, decays as logarithms, and value
heads in an order of Hugging Face's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus_converters.checkpoint import Checkpoint
from orthrus_converters.json_file import JsonFile, describe
from orthrus_converters.source_tensor import Change, HeadOrder, SourceTensor
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import MAX_HEAD_DIM, MAX_HEADS, ModelConfig
from orthrus_gguf.model.hybrid import ATTENTION_EVERY, CONV_KERNEL, Hybrid
from orthrus_gguf.model.tensors import original_of, twin_of

NESTED, FLAT = "qwen3_5", "qwen3_5_text"
#: With diffusion heads, flat.
HEADS = "orthrus_qwen3_5"

#: Relatives that are refused by name.
RELATIVES = {
    "qwen3_5_moe": "Qwen3.5 with experts",
    "qwen3_5_moe_text": "Qwen3.5 with experts",
    "qwen3_next": "Qwen3-Next, with experts and other projections",
    "qwen4_exp": "a hybrid of another kind",
    "qwen4_exp_text": "a hybrid of another kind",
}

#: Fields of config.json that are read here.
FIELDS = {
    "full_attention_interval",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "mtp_num_hidden_layers",
}
#: Fields that change nothing of the text model: its state is kept in single precision anyway.
DEAD = {"mamba_ssm_dtype", "image_token_id", "language_model_only", "video_token_id"} | {
    "vision_start_token_id",
    "vision_end_token_id",
}


def _twin_of(name: str) -> str:
    """What checkpoints call the diffusion view's stand-in."""
    stem, dot, part = name.rpartition(".weight")
    return f"{stem}_diff.weight" if dot else f"{part}_diff"


#: In a layer of the file → in a layer of the checkpoint.
PARTS = {
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_a": "linear_attn.A_log",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
}
#: The twins of those that views have of their own.
PARTS |= {
    twin_of(ours): _twin_of(theirs)
    for ours, theirs in PARTS.items()
    if theirs.startswith("linear_attn.")
}
#: Of the MTP block, what is no part of its layer.
MTP_PARTS = {
    "nextn.eh_proj.weight": "mtp.fc.weight",
    "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "mtp.norm.weight",
}
MTP_LAYER = "mtp.layers.0."

#: What transformers takes where a config does not say: the share of a head that RoPE turns, and the
#: sections of its pairs.
_SHARE, _SECTIONS = 0.25, [11, 11, 10]

_TEXT, _VISION = "model.language_model.", "model.visual."
_ADVICE = "only plain qwen35 models are supported"


def flattened(config: JsonFile) -> JsonFile:
    """The config of the text model, whether it stands in a config of its own or within one of more.

    Raises OrthrusError for relatives of other architectures.
    """
    kind = config.values.get("model_type")
    if kind == HEADS:
        return JsonFile(config.path, {**config.values, "model_type": FLAT})
    if isinstance(kind, str) and kind in RELATIVES:
        raise config.error(
            "model_type", f"is {kind}, {RELATIVES[kind]}", "use a dense Qwen3.5 or 3.6 (qwen3_5)"
        )
    if kind != NESTED:
        return config
    outer = {k: v for k, v in config.values.items() if k not in ("text_config", "vision_config")}
    text = {k: v for k, v in config.mapping("text_config").items() if v is not None}
    tied = "tie_word_embeddings"
    if tied in outer and tied in text and outer[tied] != text[tied]:
        raise config.error(f"text_config.{tied}", f"contradicts {tied}", "remove the wrong one")
    return JsonFile(config.path, outer | text | {"model_type": FLAT})


def read_hybrid(config: JsonFile, head_dim: int, n_layers: int) -> Hybrid:
    """Shape of the DeltaNet layers; the MTP block is left to `with_mtp`. Raises OrthrusError."""
    sizes = [
        config.integer(f"linear_{part}_head_dim", 1, MAX_HEAD_DIM) for part in ("key", "value")
    ]
    if sizes[0] != sizes[1]:
        raise config.error(
            "linear_value_head_dim", f"{sizes[1]} is not the keys' {sizes[0]}", _ADVICE
        )
    n_key_heads = config.integer("linear_num_key_heads", 1, MAX_HEADS)
    n_value_heads = config.integer("linear_num_value_heads", 1, MAX_HEADS)
    if n_value_heads % n_key_heads:
        raise config.error(
            "linear_num_value_heads",
            f"{n_value_heads} is no multiple of {n_key_heads} key heads",
            "correct it",
        )
    kernel = config.integer("linear_conv_kernel_dim", 1, MAX_HEADS)
    if kernel != CONV_KERNEL:
        raise config.error("linear_conv_kernel_dim", f"expected 4, found {kernel}", _ADVICE)
    rotary, sections = _rotary(config, head_dim)
    every = _attention_every(config, n_layers)
    return Hybrid(n_key_heads, n_value_heads, sizes[0], rotary, sections, every)


def _rotary(config: JsonFile, head_dim: int) -> tuple[int, tuple[int, ...]]:
    """Elements of a head that RoPE turns, and the sections of its pairs."""
    rope = config.mapping("rope_parameters")
    share = rope.get("partial_rotary_factor", config.values.get("partial_rotary_factor", _SHARE))
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        key = "rope_parameters.partial_rotary_factor"
        raise config.error(key, f"expected a number up to 1, found {describe(share)}", "correct it")
    rotary = int(head_dim * share)
    sections, key = rope.get("mrope_section", _SECTIONS), "rope_parameters.mrope_section"
    if (
        not isinstance(sections, list)
        or len(sections) != 3
        or any(type(item) is not int or item < 0 for item in sections)
        or 2 * sum(sections) != rotary
    ):
        raise config.error(
            key, f"expected three numbers of {rotary / 2:g} in all, found {sections}", _ADVICE
        )
    return rotary, (*sections, 0)


def _attention_every(config: JsonFile, n_layers: int) -> int:
    every = config.integer("full_attention_interval", 1, MAX_HEADS, ATTENTION_EVERY)
    layers = config.array("layer_types")
    names = [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(n_layers)
    ]
    if layers and layers != names:
        raise config.error(
            "layer_types",
            f"expected full_attention in every layer {every} and linear_attention in the others",
            _ADVICE,
        )
    return every


def text_model(checkpoint: Checkpoint) -> Checkpoint:
    """The text model of a checkpoint, by the names that it has alone; vision is left out."""
    tensors = {
        name.replace(_TEXT, "model.", 1) if name.startswith(_TEXT) else name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith(_VISION)
    }
    left = len(checkpoint.tensors) - len(tensors)
    note = (
        f"{checkpoint.folder}: left out {left} weights of the vision model; the text model is all"
    )
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, *([note] * (left > 0))))


def with_mtp(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The config of a checkpoint that holds an MTP block, or none."""
    assert config.hybrid is not None
    mtp = any(name.startswith("mtp.") for name in checkpoint.tensors)
    return replace(config, hybrid=replace(config.hybrid, mtp=mtp))


def squeezed(within: str, source: SourceTensor) -> SourceTensor:
    """A convolution without the dimension of its single input channel. Raises OrthrusError for
    MLX's, since the norms beside it are stored otherwise too."""
    if original_of(within) != "ssm_conv1d.weight" or len(source.shape) != 3:
        return source
    channels, *rest = source.shape
    if rest == [CONV_KERNEL, 1]:
        raise OrthrusError(
            f"{source.path}: weight {source.name} lies as MLX has it, whose norms already hold the"
            " 1 that is added here; convert the original checkpoint"
        )
    return replace(source, shape=(channels, rest[1])) if rest[0] == 1 else source


def _orders(within: str, hybrid: Hybrid) -> tuple[HeadOrder | None, HeadOrder | None]:
    """The order of a weight's value heads, where these are its rows, and where its columns."""
    groups, size = hybrid.n_key_heads, hybrid.head_dim
    heads = HeadOrder(groups, hybrid.n_value_heads // groups, size)
    if heads.per_group == 1:
        return None, None
    keys = 2 * groups * size
    rows: Mapping[str, HeadOrder] = {
        "attn_qkv.weight": replace(heads, start=keys),
        "attn_gate.weight": heads,
        "ssm_alpha.weight": replace(heads, size=1),
        "ssm_beta.weight": replace(heads, size=1),
        "ssm_conv1d.weight": replace(heads, start=keys),
    }
    columns: Mapping[str, HeadOrder] = {
        "ssm_a": replace(heads, size=1),
        "ssm_dt.bias": replace(heads, size=1),
        "ssm_out.weight": heads,
    }
    return rows.get(within), columns.get(within)


def _change(within: str) -> Change | None:
    """What is done to a weight's values."""
    if within.endswith("norm.weight") and within != "ssm_norm.weight":
        return Change.PLUS_ONE
    return Change.MINUS_EXP if within == "ssm_a" else None


def as_ggml_has_it(within: str, source: SourceTensor, hybrid: Hybrid) -> SourceTensor:
    """A weight with its heads in ggml's order, norms with their 1, and decays instead of their
    logarithms. within: its name in the layer, or in the file outside of one."""
    within = original_of(within)
    rows, columns = _orders(within, hybrid)
    source = replace(source, row_order=rows, column_order=columns)
    change = _change(within)
    if change is None:
        return source
    return replace(source, change=change, dtype="F32", stored=source.dtype)


def as_checkpoints_have_it(
    within: str, values: NDArray[np.float32], hybrid: Hybrid
) -> NDArray[np.float32]:
    """The way back: what `as_ggml_has_it` makes these values of."""
    within = original_of(within)
    for axis, order in zip((0, -1), _orders(within, hybrid), strict=True):
        if order is not None:
            values = np.take(values, np.argsort(order.sources()), axis=axis)
    change = _change(within)
    if change is Change.PLUS_ONE:
        values = values - np.float32(1)
    if change is Change.MINUS_EXP:
        values = np.log(-values)
    return values[:, None] if within == "ssm_conv1d.weight" else values


def config_of(hybrid: Hybrid, head_dim: int) -> dict[str, Any]:
    """What the config of such a model with heads says besides others', among it what its
    `rope_parameters` do."""
    return {
        "model_type": HEADS,
        "full_attention_interval": hybrid.attention_every,
        "linear_conv_kernel_dim": CONV_KERNEL,
        "linear_key_head_dim": hybrid.head_dim,
        "linear_value_head_dim": hybrid.head_dim,
        "linear_num_key_heads": hybrid.n_key_heads,
        "linear_num_value_heads": hybrid.n_value_heads,
        "rope_parameters": {
            "partial_rotary_factor": hybrid.rotary_dim / head_dim,
            "mrope_section": list(hybrid.sections[:3]),
            "mrope_interleaved": True,
        },
    }
