"""Small random checkpoints as Qwen3.5 has them: DeltaNet and attention, with an MTP block.

Hugging Face's own implementation has computed logits and greedy tokens of PROMPTS once:
tests/golden/hybrid.json and hybrid.npz (its README tells how).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hf_checkpoint import REGEX, Weights, tokenizer, write_safetensors

VOCAB, WIDTH, MLP = 270, 64, 96

#: The text model: two key heads with two value heads each, so that their order matters.
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attn_output_gate": True,
    "eos_token_id": 259,
    "full_attention_interval": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 256,
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "tie_word_embeddings": True,
    "vocab_size": VOCAB,
}
#: What one with larger DeltaNet heads says instead, and three value heads to a key head.
WIDE = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 6}

NESTED: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "vision_config": {"depth": 1},
}

#: Lengths below, at and above the convolution's kernel, and a longer one.
PROMPTS = [[101], [130, 244], [92, 170, 241], [234, 191, 88, 86, 118]]
PROMPTS.append(np.random.default_rng(3).integers(0, 256, 40).tolist())
N_GREEDY = 16

PATTERN = REGEX.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(
    r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
)


def _attention(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.q_proj.weight": (2 * 4 * 32, width),
        f"{prefix}.k_proj.weight": (2 * 32, width),
        f"{prefix}.v_proj.weight": (2 * 32, width),
        f"{prefix}.o_proj.weight": (width, 4 * 32),
        f"{prefix}.q_norm.weight": (32,),
        f"{prefix}.k_norm.weight": (32,),
    }


def _delta_net(prefix: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    size, width = config["linear_key_head_dim"], config["hidden_size"]
    channels, inner = (2 * keys + values) * size, values * size
    return {
        f"{prefix}.in_proj_qkv.weight": (channels, width),
        f"{prefix}.in_proj_z.weight": (inner, width),
        f"{prefix}.in_proj_a.weight": (values, width),
        f"{prefix}.in_proj_b.weight": (values, width),
        f"{prefix}.A_log": (values,),
        f"{prefix}.dt_bias": (values,),
        f"{prefix}.conv1d.weight": (channels, 1, 4),
        f"{prefix}.norm.weight": (size,),
        f"{prefix}.out_proj.weight": (width, inner),
    }


def _layer(prefix: str, config: dict[str, Any], *, attention: bool) -> dict[str, tuple[int, ...]]:
    width, mlp = config["hidden_size"], config["intermediate_size"]
    delta_net = _delta_net(f"{prefix}.linear_attn", config)
    own = _attention(f"{prefix}.self_attn", width) if attention else delta_net
    return {
        f"{prefix}.input_layernorm.weight": (width,),
        **own,
        f"{prefix}.post_attention_layernorm.weight": (width,),
        f"{prefix}.mlp.gate_proj.weight": (mlp, width),
        f"{prefix}.mlp.up_proj.weight": (mlp, width),
        f"{prefix}.mlp.down_proj.weight": (width, mlp),
    }


def shapes(config: dict[str, Any] = TEXT, *, tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, by the names that a text model alone has."""
    width = config["hidden_size"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, width),
        "model.norm.weight": (width,),
    }
    if not tied:
        found["lm_head.weight"] = (VOCAB, width)
    for i in range(8):
        found |= _layer(f"model.layers.{i}", config, attention=i % 4 == 3)
    found |= {"mtp.fc.weight": (width, 2 * width)}
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    found |= {f"mtp.{name}.weight": (width,) for name in norms}
    return found | _layer("mtp.layers.0", config, attention=True)


def weights(overrides: dict[str, Any] | None = None, *, tied: bool = True) -> Weights:
    """Random values that bfloat16 holds exactly; activations keep their size.

    overrides: of TEXT, whose shapes they are.
    """
    rng = np.random.default_rng(1)
    found: Weights = {}
    for name, shape in shapes(TEXT | (overrides or {}), tied=tied).items():
        values = rng.standard_normal(shape)
        if name.endswith("A_log"):
            values = np.log(rng.uniform(0.5, 4, shape))
        elif name.endswith("dt_bias"):
            values = rng.uniform(-3, 0, shape)
        elif name.endswith("linear_attn.norm.weight"):
            values = 1 + 0.2 * values
        elif len(shape) == 1:
            values = 0.3 * values
        elif "conv1d" in name:
            values = 0.6 * values
        elif "embed" in name:
            values = 0.7 * values
        else:
            values = 1.3 * values / shape[-1] ** 0.5
        bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        found[name] = bits.view(np.float32)
    return found


def nested_names(plain: Weights) -> Weights:
    """The same weights by the names that a model with vision has, and weights of that."""
    named = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: w
        for name, w in plain.items()
    }
    return {**named, "model.visual.patch_embed.proj.weight": np.ones((4, 4), np.float32)}


def write_hybrid(
    folder: Path,
    config: dict[str, Any] = TEXT,
    plain: Weights | None = None,
    dtype: str = "BF16",
) -> Path:
    """A checkpoint folder; returns it. plain: the weights, by the names to write."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    described = tokenizer()
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN
    (folder / "tokenizer.json").write_text(json.dumps(described))
    write_safetensors(folder / "model.safetensors", weights() if plain is None else plain, dtype)
    return folder
