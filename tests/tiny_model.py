"""Tiny models written with the gguf package, right or deliberately wrong.

`write_model` writes a file of any architecture that runs here (`qwen3`, `qwen2`, `llama`, or
`orthrus` with the architecture of its base), tied or not, with as many heads as asked, with linear
or YaRN scaling or with RoPE's frequency factors; `write_heads` the heads that belong to it. A
tensor's weights depend on its name and shape alone, so that a base and its heads are the same model
as one file of both. They run, on stock llama.cpp too: matrices keep the size of activations, and
token ids are all that they need (`BASES`, `SCALINGS`: what to go through).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM, N_LAYERS = 40, 32, 64, 4, 2, 16, 2
BLOCK_SIZE, MASK = 8, 39
CONTEXT = 128
HEADS = (N_HEAD, N_HEAD_KV)

BASES = ("qwen3", "qwen2", "llama")
SCALINGS = ("none", "linear", "yarn", "llama3")

#: rows and columns of the tensors of a layer of a qwen3 model, written out by hand.
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


def layer_shapes(
    base: str = "qwen3", n_heads: tuple[int, int] = HEADS
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer, with `.weight` or `.bias`."""
    q_rows, kv_rows = (16 * n for n in n_heads)
    shapes = {f"{name}.weight": shape for name, shape in LAYER.items()}
    shapes["attn_q.weight"], shapes["attn_output.weight"] = (q_rows, 32), (32, q_rows)
    shapes["attn_k.weight"] = shapes["attn_v.weight"] = (kv_rows, 32)
    if base != "qwen3":
        del shapes["attn_q_norm.weight"], shapes["attn_k_norm.weight"]
    if base == "qwen2":
        shapes["attn_q.bias"] = (q_rows,)
        shapes["attn_k.bias"] = shapes["attn_v.bias"] = (kv_rows,)
    return shapes


def shape_keys(arch: str, n_heads: tuple[int, int] = HEADS) -> dict[str, Any]:
    """The metadata that describes the tiny model's shape, as the converter writes it."""
    return {
        f"{arch}.block_count": np.uint32(N_LAYERS),
        f"{arch}.context_length": np.uint32(CONTEXT),
        f"{arch}.embedding_length": np.uint32(N_EMBD),
        f"{arch}.feed_forward_length": np.uint32(N_FF),
        f"{arch}.attention.head_count": np.uint32(n_heads[0]),
        f"{arch}.attention.head_count_kv": np.uint32(n_heads[1]),
        f"{arch}.attention.key_length": np.uint32(HEAD_DIM),
        f"{arch}.attention.value_length": np.uint32(HEAD_DIM),
        f"{arch}.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        f"{arch}.rope.freq_base": np.float32(1e6),
    }


def scaling_keys(arch: str, scaling: str) -> dict[str, Any]:
    """The metadata of one of SCALINGS."""
    if scaling not in ("linear", "yarn"):
        return {}
    keys: dict[str, Any] = {
        f"{arch}.rope.scaling.type": scaling,
        f"{arch}.rope.scaling.factor": np.float32(4),
    }
    if scaling == "yarn":
        keys[f"{arch}.rope.scaling.original_context_length"] = np.uint32(32)
    return keys


def scaling_tensors(scaling: str) -> dict[str, NDArray[Any]]:
    """The tensor of one of SCALINGS: llama3 has factors from 1 to 8, as Llama 3.1 has."""
    if scaling != "llama3":
        return {}
    return {"rope_freqs.weight": np.geomspace(1, 8, HEAD_DIM // 2).astype(np.float32)}


def diffusion_keys() -> dict[str, Any]:
    return {
        "orthrus.diffusion.block_size": np.uint32(BLOCK_SIZE),
        "tokenizer.ggml.mask_token_id": np.uint32(MASK),
    }


def base_keys(base: str) -> dict[str, Any]:
    """What an `orthrus` file says of its base."""
    return {} if base == "qwen3" else {"orthrus.base_architecture": base}


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


def random_tensors(
    *,
    heads: bool,
    base: bool,
    tied: bool,
    architecture: str = "qwen3",
    n_heads: tuple[int, int] = HEADS,
) -> dict[str, NDArray[Any]]:
    """Random F32 weights in the converter's order, numpy shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    if base:
        shapes["token_embd.weight"] = (N_VOCAB, N_EMBD)
    for layer in range(N_LAYERS):
        for name, shape in layer_shapes(architecture, n_heads).items():
            part, kind = name.split(".")
            if base:
                shapes[f"blk.{layer}.{name}"] = shape
            if heads and part in TWINS:
                shapes[f"blk.{layer}.{part}_diff.{kind}"] = shape
    if base:
        shapes["output_norm.weight"] = (N_EMBD,)
        if not tied:
            shapes["output.weight"] = (N_VOCAB, N_EMBD)
    return {name: random_weights(name, shape) for name, shape in shapes.items()}


def random_weights(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Matrices with rows of about unit length, norms about 1, biases about 0."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(".bias"):
        values /= 2
    else:
        values = values / np.sqrt(shape[1]) if len(shape) > 1 else 1 + values / 8
    return values.astype(np.float32)


def write_model(
    path: Path,
    arch: str = "orthrus",
    *,
    base: str | None = None,
    heads: bool | None = None,
    tied: bool = True,
    n_heads: tuple[int, int] = HEADS,
    scaling: str = "none",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """A whole model; with heads if it is an `orthrus` one, unless said. Returns `path`.

    base: what its layers are, one of BASES; unless said that of `arch`, and qwen3 for `orthrus`.
    n_heads: of queries, and of keys and values. (llama.cpp runs qwen2 only with as many of queries
        as fill the width: two.)
    scaling: of RoPE, one of SCALINGS.
    metadata, tensors: what to change, REMOVE to leave something out.
    """
    heads = arch == "orthrus" if heads is None else heads
    base = base or (arch if arch in BASES else "qwen3")
    keys = {
        "general.type": "model",
        "general.name": "Tiny",
        **shape_keys(arch, n_heads),
        **scaling_keys(arch, scaling),
        **tokenizer_keys(),
    }
    if arch == "orthrus":
        keys |= base_keys(base)
    if heads:
        keys |= diffusion_keys()
    weights = scaling_tensors(scaling) | random_tensors(
        heads=heads, base=True, tied=tied, architecture=base, n_heads=n_heads
    )
    return write_gguf(path, arch, keys | dict(metadata or {}), weights | dict(tensors or {}))


def write_heads(
    path: Path,
    *,
    base: str = "qwen3",
    n_heads: tuple[int, int] = HEADS,
    scaling: str = "none",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """A heads file for the tiny model; arguments as for write_model."""
    keys = {
        "general.type": "adapter",
        "adapter.type": "orthrus_heads",
        **base_keys(base),
        **shape_keys("orthrus", n_heads),
        **scaling_keys("orthrus", scaling),
        **diffusion_keys(),
    }
    weights = random_tensors(heads=True, base=False, tied=True, architecture=base, n_heads=n_heads)
    return write_gguf(path, "orthrus", keys | dict(metadata or {}), weights | dict(tensors or {}))


def write_drafter(
    path: Path,
    arch: str = "dflash",
    *,
    taps: tuple[int, ...] = (1, 2),
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """A DFlash drafter for the tiny model, which reads the inputs of layers `taps`; other arguments
    as for write_model."""
    keys = {
        **shape_keys(arch),
        **tokenizer_keys(),
        f"{arch}.block_size": np.uint32(BLOCK_SIZE),
        f"{arch}.target_layers": np.array(taps, np.int32),
        "tokenizer.ggml.mask_token_id": np.uint32(MASK),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (N_EMBD, len(taps) * N_EMBD),
        "enc.output_norm.weight": (N_EMBD,),
        "output_norm.weight": (N_EMBD,),
    }
    for layer in range(N_LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in layer_shapes().items()}
    weights = {name: random_weights(f"draft.{name}", shape) for name, shape in shapes.items()}
    return write_gguf(path, arch, keys | dict(metadata or {}), weights | dict(tensors or {}))


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
