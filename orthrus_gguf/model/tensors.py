"""Which tensors a model file must hold, and the check that it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.hybrid import CONV_KERNEL

TOKEN_EMBD = "token_embd.weight"
OUTPUT = "output.weight"
OUTPUT_NORM = "output_norm.weight"
#: Divides the frequency of each pair of RoPE (`Rope.freq_factors`).
ROPE_FREQS = "rope_freqs.weight"

#: Of a drafter: what it makes of what the target's layers read.
FEATURES = "fc.weight"
FEATURES_NORM = "enc.output_norm.weight"

#: In an MTP block: the norm before the output, the embedding and the output matrix, where those are
#: not the model's own.
MTP_NORM = "nextn.shared_head_norm.weight"
MTP_EMBD = "nextn.embed_tokens.weight"
MTP_OUTPUT = "nextn.shared_head_head.weight"
#: What makes one vector of a token's embedding and what the model's last layer gave; norms of both.
MTP_PROJECTION = "nextn.eh_proj.weight"
MTP_EMBD_NORM = "nextn.enorm.weight"
MTP_HIDDEN_NORM = "nextn.hnorm.weight"

#: Of a gated DeltaNet, by what each is in the runtimes.
DELTA_NET = {
    "qkv": "attn_qkv.weight",
    "gate": "attn_gate.weight",
    "a": "ssm_a",
    "alpha": "ssm_alpha.weight",
    "beta": "ssm_beta.weight",
    "conv": "ssm_conv1d.weight",
    "dt": "ssm_dt.bias",
    "norm": "ssm_norm.weight",
    "out": "ssm_out.weight",
}

_TYPES = gguf.GGMLQuantizationType
FLOAT_TYPES = frozenset({_TYPES.F32, _TYPES.F16, _TYPES.BF16})
_NOT_WEIGHTS = frozenset({_TYPES.I8, _TYPES.I16, _TYPES.I32, _TYPES.I64})

#: Ends of names that say which part of a pair a tensor is.
_PARTS = ("weight", "bias")

#: Beginnings of names of which no unknown one may be left out of account.
_MATTERS = ("blk.", "output", "token_embd", "position_embd", "rope_")


def base_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape (numpy order) of every tensor of the AR model, in llama.cpp's order."""
    tensors: dict[str, tuple[int, ...]] = {}
    if config.rope.freq_factors is not None:
        tensors[ROPE_FREQS] = (config.head_dim // 2,)
    tensors[TOKEN_EMBD] = (config.n_vocab, config.n_embd)
    for index, kind in enumerate(config.layer_kinds):
        tensors |= _in_layer(index, _layer_shapes(config, kind))
    if config.hybrid is not None and config.hybrid.mtp:
        tensors |= mtp_tensors(config)
    tensors[OUTPUT_NORM] = (config.n_embd,)
    if not config.tied:
        tensors[OUTPUT] = (config.n_vocab, config.n_embd)
    return tensors


def diffusion_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape (numpy order) of the `_diff` twins, which only the diffusion view uses.

    Every tensor of what mixes the rows of a layer has one: of the attention, biases and norms of q
    and k included, or of the DeltaNet.
    """
    tensors: dict[str, tuple[int, ...]] = {}
    for index, kind in enumerate(config.layer_kinds):
        twins = {twin_of(name): shape for name, shape in _mixing_shapes(config, kind).items()}
        tensors |= _in_layer(index, twins)
    return tensors


def mtp_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape (numpy order) of the MTP block of a model, behind its layers."""
    shapes = _layer_shapes(config, LayerKind.ATTENTION) | _mtp_shapes(config)
    return _in_layer(config.n_layers, shapes)


def optional_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape (numpy order) of what an MTP block may hold besides: its last norm, embedding
    and output matrix, for which the model's own stand in."""
    if config.hybrid is None or not config.hybrid.mtp:
        return {}
    matrix = (config.n_vocab, config.n_embd)
    shapes = {
        MTP_NORM: (config.n_embd,),
        MTP_EMBD: matrix,
        MTP_OUTPUT: matrix,
    }
    return _in_layer(config.n_layers, shapes)


def drafter_tensors(config: ModelConfig, n_taps: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape (numpy order) of a drafter's network that reads `n_taps` layers of its target:
    whatever lies between the target's embedding and its output."""
    return {
        FEATURES: (config.n_embd, n_taps * config.n_embd),
        FEATURES_NORM: (config.n_embd,),
        OUTPUT_NORM: (config.n_embd,),
        **_per_layer(config, _layer_shapes(config, LayerKind.ATTENTION)),
    }


def twin_of(name: str) -> str:
    """The diffusion view's stand-in: `….attn_q.bias` -> `….attn_q_diff.bias`, `….ssm_a` ->
    `….ssm_a_diff`."""
    stem, _, part = name.rpartition(".")
    return f"{stem}_diff.{part}" if part in _PARTS else f"{name}_diff"


def in_view(name: str, suffix: str) -> str:
    """A tensor of a view. suffix: that its tensors have: none, or that of twins."""
    return twin_of(name) if suffix else name


def original_of(name: str) -> str:
    """What a twin stands in for; other names as they are."""
    stem, dot, part = name.rpartition(".")
    if part in _PARTS:
        return stem.removesuffix("_diff") + dot + part
    return name.removesuffix("_diff")


def is_diffusion_tensor(name: str) -> bool:
    """True for `blk.N.<...>_diff`, `.weight` or `.bias` behind it or nothing."""
    return name.startswith("blk.") and original_of(name) != name


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within the layer -> shape of what each view has of its own."""
    arch = config.architecture
    rows = {
        "q": config.n_head * config.head_dim,
        "k": config.n_head_kv * config.head_dim,
        "v": config.n_head_kv * config.head_dim,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for part, n in rows.items():
        gates = n if arch.hybrid and part == "q" else 0
        shapes[f"attn_{part}.weight"] = (n + gates, config.n_embd)
        if arch.qkv_biases:
            shapes[f"attn_{part}.bias"] = (n,)
    shapes["attn_output.weight"] = (config.n_embd, rows["q"])
    if arch.qk_norms:
        shapes |= {f"attn_{part}_norm.weight": (config.head_dim,) for part in "qk"}
    return shapes


def _delta_net_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within the layer -> shape of a gated DeltaNet."""
    hybrid = config.hybrid
    assert hybrid is not None
    shapes = {
        "qkv": (hybrid.channels, config.n_embd),
        "gate": (hybrid.inner, config.n_embd),
        "a": (hybrid.n_value_heads,),
        "alpha": (hybrid.n_value_heads, config.n_embd),
        "beta": (hybrid.n_value_heads, config.n_embd),
        "conv": (hybrid.channels, CONV_KERNEL),
        "dt": (hybrid.n_value_heads,),
        "norm": (hybrid.head_dim,),
        "out": (config.n_embd, hybrid.inner),
    }
    return {name: shapes[part] for part, name in DELTA_NET.items()}


def _mtp_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within the block -> shape of what an MTP block has beside a layer of attention."""
    return {
        MTP_PROJECTION: (config.n_embd, 2 * config.n_embd),
        MTP_EMBD_NORM: (config.n_embd,),
        MTP_HIDDEN_NORM: (config.n_embd,),
    }


def _mixing_shapes(config: ModelConfig, kind: LayerKind) -> dict[str, tuple[int, ...]]:
    """Name within the layer -> shape of what mixes its rows, which each view has of its own."""
    own = _attention_shapes if kind is LayerKind.ATTENTION else _delta_net_shapes
    return own(config)


def _layer_shapes(config: ModelConfig, kind: LayerKind) -> dict[str, tuple[int, ...]]:
    """Name within the layer -> shape of the AR tensors of one layer."""
    return {
        "attn_norm.weight": (config.n_embd,),
        **_mixing_shapes(config, kind),
        f"{config.architecture.mlp_norm}.weight": (config.n_embd,),
        "ffn_gate.weight": (config.n_ff, config.n_embd),
        "ffn_up.weight": (config.n_ff, config.n_embd),
        "ffn_down.weight": (config.n_embd, config.n_ff),
    }


def _per_layer(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for index in range(config.n_layers)
        for name, shape in _in_layer(index, shapes).items()
    }


def _in_layer(index: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"blk.{index}.{name}": shape for name, shape in shapes.items()}


def check_tensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    architecture: str,
    optional: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Raise OrthrusError unless `tensors` of the file `path` hold all that is `expected`.

    Tensors beyond those are ignored, except where ignoring them would change the results: all that
    stand in a layer, and further parts of embedding, output and RoPE. architecture: the base's
    name, for messages. optional: what may be missing, and counts as known.
    """
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise OrthrusError(
            f"{path}: tensor {missing[0]}{more} is missing, expected shape {expected[missing[0]]}; "
            "the file is incomplete or its metadata is wrong: convert the model again"
        )
    expected = {**expected, **{name: optional[name] for name in optional if name in tensors}}
    for name, shape in expected.items():
        _check_tensor(path, tensors[name], shape)
    layers = {name.split(".")[1] for name in expected if name.startswith("blk.")}
    for name in tensors:
        if name in expected or not name.startswith(_MATTERS):
            continue
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) > 2 and parts[1] not in layers:
            raise OrthrusError(
                f"{path}: tensor {name!r} belongs to no layer: the metadata says {len(layers)} "
                "layers; convert the model again"
            )
        raise OrthrusError(
            f"{path}: tensor {name!r} is not supported: {architecture} models have no such part "
            "here (its biases, scales, experts or norms would be left out); use a standard "
            "conversion of the model"
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
            "convert the model again with its norms and biases unquantized"
        )
    if info.type in _NOT_WEIGHTS:
        raise OrthrusError(
            f"{path}: tensor {info.name}: expected a weight type, found {info.type.name}; "
            "convert the model again"
        )
