"""config.json of a Hugging Face checkpoint → ModelConfig.

Fields that would make the model compute something else than its architecture are errors; fields
that have no effect on it are ignored; fields that are neither known to matter nor known not to are
reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus_converters import hf_qwen35
from orthrus_converters.hf_rope import read_rope, unread_settings
from orthrus_converters.json_file import JsonFile, describe
from orthrus_gguf.model.architectures import LLAMA, QWEN2, QWEN3, QWEN35, Architecture
from orthrus_gguf.model.config import (
    BLOCK_SIZES,
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    ModelConfig,
    Rope,
)

#: Fields that change the arithmetic, with the values under which they do not.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "moe_intermediate_size": (0,),
    "n_routed_experts": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "qk_norm": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}


#: What to do about some of them.
_ADVICE = {
    "quantization_config": "the weights are quantized already: convert the original checkpoint, "
    "and choose a --type",
}


@dataclass(frozen=True)
class _Family:
    """What a `model_type` computes.

    only: what differs from _ONLY; None where a field has no effect. stated: fields that must not be
    left out, since their default changes the arithmetic. freq_base: RoPE's, where the config does
    not say. all_kv: as many KV heads as heads, where it does not.
    """

    architecture: Architecture
    only: Mapping[str, tuple[Any, ...] | None]
    stated: tuple[str, ...] = ()
    freq_base: float | None = None
    all_kv: bool = False

    @property
    def checked(self) -> dict[str, tuple[Any, ...]]:
        """Field → values that are supported."""
        fields = {**_ONLY, **self.only}
        return {key: allowed for key, allowed in fields.items() if allowed is not None}


_FAMILIES = {
    "qwen3": _Family(QWEN3, {"qk_norm": (True,), "use_qk_norm": (True,)}),
    # Biases of q, k and v are no choice there, and the field is not read.
    "qwen2": _Family(QWEN2, {"attention_bias": None}),
    "llama": _Family(LLAMA, {}, freq_base=10_000.0, all_kv=True),
    # As in llama.cpp, a Mistral without sliding window is a Llama.
    "mistral": _Family(
        LLAMA, {"sliding_window": ()}, stated=("sliding_window",), freq_base=10_000.0
    ),
    hf_qwen35.FLAT: _Family(
        QWEN35,
        {
            "attn_output_gate": (True,),
            "mlp_only_layers": ([],),
            "mtp_use_dedicated_embeddings": (False,),
            "output_gate_type": ("swish",),  # SiLU, as it is where a config does not say
            "partial_rotary_factor": None,
        },
    ),
}

_READ = hf_qwen35.FIELDS | {
    "architectures",
    "block_size",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "mask_token_id",
    "model_type",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}

#: Fields about training, about how transformers runs, or about generation: no part of the model.
_DEAD = hf_qwen35.DEAD | {
    "_attn_implementation",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "hidden_dropout",
    "initializer_range",
    "is_llama_config",
    "lora_alpha",
    "lora_dropout",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "r",
    "return_dict",
    "sliding_window",  # unless use_sliding_window, or in Mistral's
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}


def read_config_file(path: Path) -> JsonFile:
    """config.json, of the text model where it is about more. Raises OrthrusError."""
    return hf_qwen35.flattened(JsonFile.read(path))


def read_config(config: JsonFile, name: str, *, has_heads: bool) -> ModelConfig:
    """The shape and constants of the model, under `name`. Raises OrthrusError naming the field.

    has_heads: whether the block size and the mask token are required, or left out.
    """
    family = _family(config)
    _check_arithmetic(config, family)
    n_embd = config.integer("hidden_size", 1, MAX_WIDTH)
    n_head = config.integer("num_attention_heads", 1, MAX_HEADS)
    default_kv = n_head if family.all_kv else None
    n_head_kv = config.integer("num_key_value_heads", 1, n_head, default_kv)
    n_vocab = config.integer("vocab_size", 1, MAX_VOCAB)
    if n_head % n_head_kv:
        raise config.error(
            "num_key_value_heads", f"{n_head_kv} does not divide {n_head} heads", "correct it"
        )
    head_dim = config.integer("head_dim", 2, MAX_HEAD_DIM, default=n_embd // n_head)
    if head_dim % 2:
        raise config.error("head_dim", f"expected an even number, found {head_dim}", "correct it")
    n_layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    hybrid = None
    if family.architecture.hybrid:
        hybrid = hf_qwen35.read_hybrid(config, head_dim, n_layers)
    return ModelConfig(
        name=name,
        n_layers=n_layers,
        n_ctx_train=config.integer("max_position_embeddings", 1, MAX_CONTEXT),
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size", 1, MAX_WIDTH),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=n_vocab,
        rms_eps=config.positive("rms_norm_eps"),
        rope=_rope(config, family, head_dim),
        tied=config.boolean("tie_word_embeddings", default=False),  # of all these families
        block_size=config.integer("block_size", *BLOCK_SIZES) if has_heads else None,
        mask_token=config.integer("mask_token_id", 0, n_vocab - 1) if has_heads else None,
        architecture=family.architecture,
        hybrid=hybrid,
    )


def _rope(config: JsonFile, family: _Family, head_dim: int) -> Rope:
    hybrid = family.architecture.hybrid
    rope = read_rope(config, head_dim, family.freq_base, multimodal=hybrid)
    if rope.freq_factors is not None and family.architecture is not LLAMA:
        raise config.error(
            "rope_parameters",
            "has Llama 3's scaling",
            f"GGUF files of {family.architecture.name} models have no place for it",
        )
    return rope


def unknown_fields(config: JsonFile) -> list[str]:
    """The fields that read_config() neither uses, nor checks, nor knows to be without effect."""
    checked = set(_ONLY).union(*(family.only for family in _FAMILIES.values()))
    return sorted(set(config.values) - _READ - _DEAD - checked) + unread_settings(config)


def _family(config: JsonFile) -> _Family:
    kind = config.values.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        *others, last = map(describe, _FAMILIES)
        raise config.error(
            "model_type",
            f"expected {', '.join(others)} or {last}, found {describe(kind)}",
            "models of other architectures are not supported",
        )
    return _FAMILIES[kind]


def _check_arithmetic(config: JsonFile, family: _Family) -> None:
    """Raise OrthrusError if a field says that the model is not plainly of its architecture."""
    for key in family.stated:
        if key not in config.values:
            raise config.error(key, "is missing, and not without effect", "add it, as null")
    for key, allowed in family.checked.items():
        value = config.values.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(describe(item) for item in allowed) or "nothing"
            raise config.error(
                key,
                f"expected {expected}, found {describe(value)}",
                _ADVICE.get(key, f"only plain {family.architecture.name} models are supported"),
            )
    layers = config.values.get("layer_types")
    if family.architecture.hybrid:
        return
    if layers is not None and not (
        isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    ):
        raise config.error(
            "layer_types",
            f'expected "full_attention" for every layer, found {describe(layers)} with others',
            "sliding-window layers are not supported",
        )
