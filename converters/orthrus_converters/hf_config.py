"""config.json of a Hugging Face checkpoint → ModelConfig.

Fields that would make the model compute something else than Qwen3 are errors; fields that have no
effect on it are ignored; fields that are neither known to matter nor known not to are reported.
"""

from __future__ import annotations

from typing import Any

from orthrus_converters.hf_rope import read_rope
from orthrus_converters.json_file import JsonFile, describe
from orthrus_gguf.model.config import (
    BLOCK_SIZES,
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    ModelConfig,
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
    "model_type": ("qwen3",),
    "moe_intermediate_size": (0,),
    "n_routed_experts": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "qk_norm": (True,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "use_qk_norm": (True,),
    "use_sliding_window": (False,),
}

_READ = {
    "architectures",
    "block_size",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "mask_token_id",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}

#: Fields about training, about how transformers runs, or about generation: no part of the model.
_DEAD = {
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
    "lora_alpha",
    "lora_dropout",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "r",
    "return_dict",
    "sliding_window",  # unless use_sliding_window
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}


def read_config(config: JsonFile, name: str) -> ModelConfig:
    """The shape and constants of the model, under `name`. Raises OrthrusError naming the field."""
    _check_arithmetic(config)
    n_embd = config.integer("hidden_size", 1, MAX_WIDTH)
    n_head = config.integer("num_attention_heads", 1, MAX_HEADS)
    n_head_kv = config.integer("num_key_value_heads", 1, n_head)
    n_vocab = config.integer("vocab_size", 1, MAX_VOCAB)
    if n_head % n_head_kv:
        raise config.error(
            "num_key_value_heads", f"{n_head_kv} does not divide {n_head} heads", "correct it"
        )
    head_dim = config.integer("head_dim", 2, MAX_HEAD_DIM, default=n_embd // n_head)
    if head_dim % 2:
        raise config.error("head_dim", f"expected an even number, found {head_dim}", "correct it")
    return ModelConfig(
        name=name,
        n_layers=config.integer("num_hidden_layers", 1, MAX_LAYERS),
        n_ctx_train=config.integer("max_position_embeddings", 1, MAX_CONTEXT),
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size", 1, MAX_WIDTH),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=n_vocab,
        rms_eps=config.positive("rms_norm_eps"),
        rope=read_rope(config),
        tied=config.boolean("tie_word_embeddings", default=False),  # the default of Qwen3Config
        block_size=config.integer("block_size", *BLOCK_SIZES),
        mask_token=config.integer("mask_token_id", 0, n_vocab - 1),
    )


def unknown_fields(config: JsonFile) -> list[str]:
    """The fields that read_config() neither uses, nor checks, nor knows to be without effect."""
    return sorted(set(config.values) - _READ - _DEAD - set(_ONLY))


def _check_arithmetic(config: JsonFile) -> None:
    """Raise OrthrusError if a field says that the model is not plain Qwen3."""
    for key, allowed in _ONLY.items():
        value = config.values.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(describe(item) for item in allowed) or "nothing"
            raise config.error(
                key,
                f"expected {expected}, found {describe(value)}",
                "only the arithmetic of Qwen3 is supported",
            )
    layers = config.values.get("layer_types")
    if layers is not None and not (
        isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    ):
        raise config.error(
            "layer_types",
            f'expected "full_attention" for every layer, found {describe(layers)} with others',
            "sliding-window layers are not supported",
        )
