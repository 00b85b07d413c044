"""Hugging Face checkpoints for tests, written and read byte by byte, without the converter."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

Weights = dict[str, NDArray[np.float32]]

#: Two layers, untied, head_dim (32) other than hidden_size / heads (16), two queries per KV head.
CONFIG: dict[str, Any] = {
    "architectures": ["OrthrusLM"],
    "attention_bias": False,
    "block_size": 8,
    "bos_token_id": 259,
    "eos_token_id": 259,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "mask_token_id": 261,
    "max_position_embeddings": 128,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 270,
}

#: The same with biases, without norms of q and k, and tied, as Qwen2 has it.
QWEN2_CONFIG: dict[str, Any] = {
    **{key: value for key, value in CONFIG.items() if key not in ("attention_bias", "head_dim")},
    "model_type": "qwen2",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "use_sliding_window": False,
    "sliding_window": 32,
}

#: Neither biases nor such norms; frequency factors that keep, blend and scale frequencies.
LLAMA_CONFIG: dict[str, Any] = {
    **CONFIG,
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of the same model without heads."""
    kept = {k: v for k, v in config.items() if k not in ("block_size", "mask_token_id")}
    return {**kept, "architectures": [_ARCHITECTURES[config["model_type"]]]}


MERGES = [("a", "b"), ("Ġ", "a"), ("Ġa", "b")]
ADDED = ["<|end|>", "<think>", "<|mask|>"]  # ids 259, 260, 261; the rest up to 270 is unused

REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer() -> dict[str, Any]:
    """tokenizer.json: 256 bytes, three merges, three added tokens, split like Qwen2."""
    texts = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(texts) + index,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": text == "<|mask|>",
            }
            for index, text in enumerate(ADDED)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": REGEX},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(texts)},
            "merges": [list(pair) for pair in MERGES],
        },
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, as the official implementation names them."""
    hidden, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    n_head = config["num_attention_heads"]
    q, kv = n_head * head_dim, config.get("num_key_value_heads", n_head) * head_dim
    result: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for view in ("", "_diff") if "block_size" in config else ("",):
            attention = f"{prefix}.self_attn"
            result[f"{attention}.q_proj{view}.weight"] = (q, hidden)
            result[f"{attention}.k_proj{view}.weight"] = (kv, hidden)
            result[f"{attention}.v_proj{view}.weight"] = (kv, hidden)
            result[f"{attention}.o_proj{view}.weight"] = (hidden, q)
            if config["model_type"] == "qwen3":
                result[f"{attention}.q_norm{view}.weight"] = (head_dim,)
                result[f"{attention}.k_norm{view}.weight"] = (head_dim,)
            if config["model_type"] == "qwen2":
                for part, rows in (("q", q), ("k", kv), ("v", kv)):
                    result[f"{attention}.{part}_proj{view}.bias"] = (rows,)
        result[f"{prefix}.mlp.gate_proj.weight"] = (ff, hidden)
        result[f"{prefix}.mlp.up_proj.weight"] = (ff, hidden)
        result[f"{prefix}.mlp.down_proj.weight"] = (hidden, ff)
        result[f"{prefix}.input_layernorm.weight"] = (hidden,)
        result[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return result


def random_weights(config: Mapping[str, Any]) -> Weights:
    """Random values that bfloat16 and float16 both hold exactly."""
    rng = np.random.default_rng(1)
    return {
        name: (rng.integers(-128, 128, shape) / 512).astype(np.float32)
        for name, shape in shapes(config).items()
    }


def to_bytes(values: NDArray[np.float32], dtype: str) -> bytes:
    """Little-endian data of a safetensors dtype (BF16: the upper half of float32)."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def write_safetensors(path: Path, weights: Mapping[str, NDArray[np.float32]], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    offset = 0
    for name, values in weights.items():
        data = to_bytes(values, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        parts.append(data)
    write_raw_safetensors(path, header, b"".join(parts))


def write_raw_safetensors(path: Path, header: object, data: bytes) -> None:
    """A header, right or wrong, and data."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path: Path) -> Weights:
    """All weights as float32."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    weights: Weights = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        raw = data[8 + length + start : 8 + length + stop]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[entry["dtype"]])
        weights[name] = values.astype(np.float32).reshape(entry["shape"])
    return weights


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] = CONFIG,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    dtype: str = "BF16",
    n_shards: int = 1,
) -> Path:
    """A whole checkpoint with a tokenizer. One shard: no index. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer())
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "pad_token": None})
    weights = random_weights(config) if weights is None else weights
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return folder
    weight_map: dict[str, str] = {}
    names: Sequence[str] = list(weights)
    for shard in range(n_shards):
        part = names[shard::n_shards]
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        write_safetensors(folder / file, {name: weights[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder
