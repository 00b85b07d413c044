"""Which tensors a model file must hold, and the check that it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig

TOKEN_EMBD = "token_embd.weight"
OUTPUT = "output.weight"

_TYPES = gguf.GGMLQuantizationType
FLOAT_TYPES = frozenset({_TYPES.F32, _TYPES.F16, _TYPES.BF16})
_NOT_WEIGHTS = frozenset({_TYPES.I8, _TYPES.I16, _TYPES.I32, _TYPES.I64})


def base_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape (numpy order) of every tensor of the AR model, in llama.cpp's order."""
    tensors: dict[str, tuple[int, ...]] = {TOKEN_EMBD: (config.n_vocab, config.n_embd)}
    tensors |= _per_layer(config, _layer_shapes(config))
    tensors["output_norm.weight"] = (config.n_embd,)
    if not config.tied:
        tensors[OUTPUT] = (config.n_vocab, config.n_embd)
    return tensors


def diffusion_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape (numpy order) of the `_diff` twins, which only the diffusion view uses."""
    shapes = _layer_shapes(config)
    twins = {name: shapes[name.removesuffix("_diff")] for name in keys.DIFFUSION_TENSORS}
    return _per_layer(config, twins)


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within the layer -> shape of the AR tensors of one layer."""
    q_rows, kv_rows = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    return {
        "attn_norm": (config.n_embd,),
        "attn_q": (q_rows, config.n_embd),
        "attn_k": (kv_rows, config.n_embd),
        "attn_v": (kv_rows, config.n_embd),
        "attn_output": (config.n_embd, q_rows),
        "attn_q_norm": (config.head_dim,),
        "attn_k_norm": (config.head_dim,),
        "ffn_norm": (config.n_embd,),
        "ffn_gate": (config.n_ff, config.n_embd),
        "ffn_up": (config.n_ff, config.n_embd),
        "ffn_down": (config.n_embd, config.n_ff),
    }


def _per_layer(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{index}.{name}.weight": shape
        for index in range(config.n_layers)
        for name, shape in shapes.items()
    }


def is_diffusion_tensor(name: str) -> bool:
    """True for `blk.N.<...>_diff.weight`."""
    return name.startswith("blk.") and name.endswith("_diff.weight")


def check_tensors(
    path: Path, tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise OrthrusError unless `tensors` of the file `path` hold all that is `expected`.

    Tensors beyond those are ignored, except where ignoring them would change the results: other
    parts of an expected tensor (biases, scales) and further layers.
    """
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise OrthrusError(
            f"{path}: tensor {missing[0]}{more} is missing, expected shape {expected[missing[0]]}; "
            "the file is incomplete or its metadata is wrong: convert the model again"
        )
    for name, shape in expected.items():
        _check_tensor(path, tensors[name], shape)
    layers = {name.split(".")[1] for name in expected if name.startswith("blk.")}
    for name in tensors:
        if name in expected:
            continue
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) > 2 and parts[1] not in layers:
            raise OrthrusError(
                f"{path}: tensor {name!r} belongs to no layer: the metadata says {len(layers)} "
                "layers; convert the model again"
            )
        if name.rpartition(".")[0] + ".weight" in expected:
            raise OrthrusError(
                f"{path}: tensor {name!r} is not supported (attention biases and weight scales are "
                "not part of Qwen3); use a standard conversion of the model"
            )


def _check_tensor(path: Path, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise OrthrusError(
            f"{path}: tensor {info.name}: expected shape {shape}, found {info.shape}; "
            "the metadata does not belong to these tensors: convert the model again"
        )
    if len(shape) == 1 and info.type not in FLOAT_TYPES:
        raise OrthrusError(
            f"{path}: tensor {info.name}: expected F32, F16 or BF16, found {info.type.name}; "
            "convert the model again with its norms unquantized"
        )
    if info.type in _NOT_WEIGHTS:
        raise OrthrusError(
            f"{path}: tensor {info.name}: expected a weight type, found {info.type.name}; "
            "convert the model again"
        )
