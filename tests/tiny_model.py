"""Tiny models written with the gguf package, right or deliberately wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM, N_LAYERS = 40, 32, 64, 4, 2, 16, 2
BLOCK_SIZE, MASK = 8, 39

#: rows and columns of the tensors of a layer, written out by hand.
LAYER: dict[str, tuple[int, ...]] = {
    "attn_norm": (32,),
    "attn_q": (64, 32),
    "attn_k": (32, 32),
    "attn_v": (32, 32),
    "attn_output": (32, 64),
    "attn_q_norm": (16,),
    "attn_k_norm": (16,),
    "ffn_norm": (32,),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
}
TWINS = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm")

REMOVE = object()  # as a value in changes: leave the key or tensor out


def shape_keys(arch: str) -> dict[str, Any]:
    """The metadata that describes the tiny model's shape, as the converter writes it."""
    return {
        f"{arch}.block_count": np.uint32(N_LAYERS),
        f"{arch}.context_length": np.uint32(128),
        f"{arch}.embedding_length": np.uint32(N_EMBD),
        f"{arch}.feed_forward_length": np.uint32(N_FF),
        f"{arch}.attention.head_count": np.uint32(N_HEAD),
        f"{arch}.attention.head_count_kv": np.uint32(N_HEAD_KV),
        f"{arch}.attention.key_length": np.uint32(HEAD_DIM),
        f"{arch}.attention.value_length": np.uint32(HEAD_DIM),
        f"{arch}.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        f"{arch}.rope.freq_base": np.float32(1e6),
    }


def diffusion_keys() -> dict[str, Any]:
    return {
        "orthrus.diffusion.block_size": np.uint32(BLOCK_SIZE),
        "tokenizer.ggml.mask_token_id": np.uint32(MASK),
    }


def tokenizer_keys() -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(N_VOCAB)],
        "tokenizer.ggml.token_type": np.ones(N_VOCAB, np.int32),
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.padding_token_id": np.uint32(3),
    }


def random_tensors(*, heads: bool, base: bool, tied: bool) -> dict[str, NDArray[Any]]:
    """Random F32 weights in the converter's order, numpy shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    if base:
        shapes["token_embd.weight"] = (N_VOCAB, N_EMBD)
    for layer in range(N_LAYERS):
        for name, shape in LAYER.items():
            if base:
                shapes[f"blk.{layer}.{name}.weight"] = shape
            if heads and name in TWINS:
                shapes[f"blk.{layer}.{name}_diff.weight"] = shape
    if base:
        shapes["output_norm.weight"] = (N_EMBD,)
        if not tied:
            shapes["output.weight"] = (N_VOCAB, N_EMBD)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_model(
    path: Path,
    arch: str = "orthrus",
    *,
    heads: bool | None = None,
    tied: bool = True,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """A whole model; with heads if it is an `orthrus` one, unless said. Returns `path`.

    metadata, tensors: what to change, REMOVE to leave something out.
    """
    heads = arch == "orthrus" if heads is None else heads
    keys = {"general.type": "model", "general.name": "Tiny", **shape_keys(arch), **tokenizer_keys()}
    if heads:
        keys |= diffusion_keys()
    weights = random_tensors(heads=heads, base=True, tied=tied)
    return write_gguf(path, arch, keys | dict(metadata or {}), weights | dict(tensors or {}))


def write_heads(
    path: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """A heads file for the tiny model; arguments as for write_model."""
    keys = {
        "general.type": "adapter",
        "adapter.type": "orthrus_heads",
        **shape_keys("orthrus"),
        **diffusion_keys(),
    }
    weights = random_tensors(heads=True, base=False, tied=True)
    return write_gguf(path, "orthrus", keys | dict(metadata or {}), weights | dict(tensors or {}))


def write_gguf(
    path: Path, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Path:
    """Write with the gguf package; numpy scalars and arrays keep their types.

    A tensor may be a pair (qblocks as uint8 rows, GGML type).
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if value is REMOVE:
            writer.kv_data[0].pop(key, None)
        else:
            _add_value(writer, key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        elif tensor is not REMOVE:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: Any, key: str, value: Any) -> None:
    types = gguf.GGUFValueType
    if isinstance(value, str):
        writer.add_key_value(key, value, types.STRING)
    elif isinstance(value, list):
        writer.add_key_value(key, value, types.ARRAY, types.STRING)
    elif isinstance(value, np.ndarray):
        writer.add_key_value(key, value.tolist(), types.ARRAY, types[value.dtype.name.upper()])
    else:
        value = np.asarray(value)
        writer.add_key_value(key, value.item(), types[value.dtype.name.upper()])
