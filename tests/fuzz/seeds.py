"""Small valid files of every kind that a mutation can start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny_model import REMOVE, diffusion_keys, shape_keys, write_gguf

N_VOCAB, WIDTH = 260, 32
_TYPES = gguf.GGMLQuantizationType
_LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NORMS = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")
_TWINS = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm")

YARN = {
    "orthrus.rope.scaling.type": "yarn",
    "orthrus.rope.scaling.factor": np.float32(4),
    "orthrus.rope.scaling.original_context_length": np.uint32(64),
    "orthrus.rope.scaling.yarn_beta_fast": np.float32(32),
}
LINEAR = {"llama.rope.scaling.factor": np.float32(2)}
FREQS = {"rope_freqs.weight": np.ones(WIDTH // 2, np.float32)}
QWEN2 = {"orthrus.base_architecture": "qwen2"}
_QK_NORMS = ("attn_q_norm", "attn_k_norm")


def write_seeds(folder: Path) -> list[Path]:
    """One small file per kind: models, a base, heads, vocabularies, an imatrix, odd values."""
    bpe, spm = _bpe(), _sentencepiece()
    return [
        _model(folder / "single.gguf", "orthrus", bpe),
        _model(folder / "base.gguf", "qwen3", bpe, untied=True),
        _model(folder / "yarn.gguf", "orthrus", bpe | YARN),
        _model(folder / "sentencepiece.gguf", "orthrus", spm),
        _model(folder / "llama.gguf", "llama", bpe | LINEAR, more=FREQS, without=_QK_NORMS),
        _model(folder / "qwen2.gguf", "orthrus", bpe | QWEN2, more=_biases(), without=_QK_NORMS),
        write_heads(folder / "heads.gguf"),
        _values(folder / "values.gguf"),
        _imatrix(folder / "imatrix.gguf"),
        _all_types(folder / "types.gguf"),
    ]


def write_base(path: Path) -> Path:
    """The base that the heads of `write_heads` belong to."""
    return _model(path, "qwen3", _bpe())


def write_heads(path: Path) -> Path:
    keys = {
        "general.type": "adapter",
        "adapter.type": "orthrus_heads",
        **_shape("orthrus"),
        **diffusion_keys(),
    }
    return write_gguf(path, "orthrus", keys, _twins())


def _shape(arch: str) -> dict[str, Any]:
    return shape_keys(arch) | {
        f"{arch}.block_count": np.uint32(1),
        f"{arch}.feed_forward_length": np.uint32(WIDTH),
        f"{arch}.attention.head_count": np.uint32(1),
        f"{arch}.attention.head_count_kv": np.uint32(1),
        f"{arch}.attention.key_length": np.uint32(WIDTH),
        f"{arch}.attention.value_length": np.uint32(WIDTH),
    }


def _model(
    path: Path,
    arch: str,
    vocabulary: Mapping[str, Any],
    *,
    untied: bool = False,
    more: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """more: further tensors. without: parts of a layer (and their twins) that are left out."""
    keys = {"general.type": "model", "general.name": "Seed", **_shape(arch), **vocabulary}
    tensors: dict[str, Any] = {"token_embd.weight": _quantized(N_VOCAB)}
    tensors |= {f"blk.0.{name}.weight": _quantized(WIDTH) for name in _LAYER}
    tensors |= {f"blk.0.{name}.weight": np.ones(WIDTH, np.float32) for name in _NORMS}
    tensors["output_norm.weight"] = np.ones(WIDTH, np.float32)
    if untied:
        tensors["output.weight"] = _quantized(N_VOCAB)
    if arch == "orthrus":
        keys |= diffusion_keys()
        tensors |= _twins()
    for name in without:
        tensors.pop(f"blk.0.{name}.weight")
        tensors.pop(f"blk.0.{name}_diff.weight", None)
    return write_gguf(path, arch, keys, tensors | dict(more or {}))


def _twins() -> dict[str, Any]:
    return {
        f"blk.0.{name}_diff.weight": np.ones(WIDTH, np.float32)
        if name.endswith("norm")
        else _quantized(WIDTH)
        for name in _TWINS
    }


def _biases() -> dict[str, Any]:
    names = [f"attn_{part}{twin}" for part in "qkv" for twin in ("", "_diff")]
    return {f"blk.0.{name}.bias": np.ones(WIDTH, np.float32) for name in names}


def _quantized(rows: int) -> tuple[Any, gguf.GGMLQuantizationType]:
    """Rows of WIDTH columns in Q4_0, all scales 1."""
    qblock = np.zeros(18, np.uint8)
    qblock[:2] = 0x00, 0x3C
    return np.tile(qblock, (rows, 1)), _TYPES.Q4_0


def _bpe() -> dict[str, Any]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in (*shown, *range(256, 256 + 256 - len(shown)))]
    types = np.ones(N_VOCAB, np.int32)
    types[-2:] = 3
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*letters, "ab", "abc", "<|endoftext|>", "<|mask|>"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.eos_token_id": np.uint32(N_VOCAB - 2),
        "tokenizer.ggml.add_bos_token": np.bool_(False),
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def _sentencepiece() -> dict[str, Any]:
    types = np.full(N_VOCAB, 6, np.int32)
    types[0], types[1], types[2], types[-1] = 2, 3, 3, 1
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *byte_tokens, "▁a"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": np.linspace(0, -5, N_VOCAB, dtype=np.float32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
    }


def _values(path: Path) -> Path:
    """Every type of value, alone and in arrays, and no tensors."""
    names = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    keys: dict[str, Any] = {}
    for name in (*names, "float32", "float64"):
        keys |= {f"one.{name}": np.dtype(name).type(1), f"many.{name}": np.arange(5).astype(name)}
    keys |= {"strings": ["a", "", "é"], "flag": np.bool_(True), "general.alignment": np.uint32(64)}
    return write_gguf(path, "unheard-of", keys, {})


def _imatrix(path: Path) -> Path:
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.txt"],
        "imatrix.chunk_count": np.uint32(3),
        "imatrix.chunk_size": np.uint32(512),
        "general.architecture": REMOVE,
    }
    tensors = {
        "blk.0.attn_q.weight.in_sum2": np.ones((1, WIDTH), np.float32),
        "blk.0.attn_q.weight.counts": np.ones((1, 1), np.float32),
    }
    return write_gguf(path, "", keys, tensors)


def _all_types(path: Path) -> Path:
    """Two qblocks of every type there is."""
    tensors: dict[str, Any] = {}
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        tensors[f"t.{kind.name}"] = (np.zeros((1, 2 * size), np.uint8), kind)
    return write_gguf(path, "llama", {"llama.block_count": np.uint32(1)}, tensors)
