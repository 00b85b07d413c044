"""What a pass of a model has to read, multiply and launch, by the shape and the file type."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import gguf

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.mix import Kind, Mix, fitting
from orthrus_gguf.model.tensors import (
    OUTPUT,
    TOKEN_EMBD,
    base_tensors,
    diffusion_tensors,
    is_diffusion_tensor,
)

_Type = gguf.GGMLQuantizationType

#: Bits per weight as the kernels hold them (`orthrus_kernels/packing/quant_tensor.py`): codes, one
#: 32-bit word of scales per 64 weights, and for K-quants one of (d, dmin) per 256.
PACKED_BITS = {_Type.Q4_K: 4.625, _Type.Q6_K: 6.625, _Type.Q8_0: 8.5}

#: File type → usual type of its matrices. These have predictions.
FILE_TYPES = {"q4_k_m": _Type.Q4_K, "q6_k": _Type.Q6_K, "q8_0": _Type.Q8_0}

#: Kernels per layer: residual + norm, QKV, reduce + norm + rotation + cache, attention, its
#: combination, output, residual + norm, gate + up + SiLU, down.
LAUNCHES_PER_LAYER = 9
#: Each view has its own QKV and output weights; everything else takes all rows at once.
LAUNCHES_PER_LAYER_BOTH = LAUNCHES_PER_LAYER + 2
#: Angles of the rows, embedding, last norm, head, choice of tokens.
LAUNCHES_PER_PASS = 5

CACHE_BYTES = 2  # per element: f16


@dataclass(frozen=True)
class PassWeights:
    """Weights by type that a pass multiplies: each view's attention, and what both share (MLP and
    head)."""

    ar: Mapping[Kind, int]
    diffusion: Mapping[Kind, int]
    shared: Mapping[Kind, int]


def pass_weights(config: ModelConfig, file_type: str) -> PassWeights:
    """The weights of a model with heads in one of FILE_TYPES. Raises OrthrusError for others."""
    if file_type not in FILE_TYPES:
        raise OrthrusError(f"{file_type}: no prediction; choose from {', '.join(FILE_TYPES)}")
    ar: Counter[Kind] = Counter()
    diffusion: Counter[Kind] = Counter()
    shared: Counter[Kind] = Counter()
    tensors = base_tensors(config) | diffusion_tensors(config)
    head = TOKEN_EMBD if config.tied else OUTPUT
    for name, shape in tensors.items():
        is_lookup = name == TOKEN_EMBD and not config.tied  # one row per token is next to nothing
        if len(shape) < 2 or is_lookup:
            continue
        kind = tensor_type(name, shape[-1], config, file_type)
        if kind not in PACKED_BITS:
            raise OrthrusError(
                f"{config.name}, {file_type}: no prediction for {kind.name}, which rows of "
                f"{shape[-1]} get; choose another type"
            )
        part = "head" if name == head else name.split(".")[2]
        if part.endswith("_diff"):
            diffusion[kind] += math.prod(shape)
        elif part.startswith("attn"):
            ar[kind] += math.prod(shape)
        else:
            shared[kind] += math.prod(shape)
    return PassWeights(ar, diffusion, shared)


def tensor_type(name: str, columns: int, config: ModelConfig, file_type: str) -> Kind:
    """llama-quantize's type for a matrix with rows of `columns`."""
    kind = FILE_TYPES[file_type]
    mix = Mix.of(config, file_type, kind, has_imatrix=False)
    if name == OUTPUT:
        kind = mix.output(columns)
    elif name == TOKEN_EMBD:
        kind = mix.embedding(columns)
    elif not is_diffusion_tensor(name):
        _, layer, part, _ = name.split(".")
        kind = mix.matrix(part, int(layer))
    return fitting(kind, columns)


def packed_bytes(weights: Mapping[Kind, int]) -> float:
    """Bytes of these weights on the device."""
    return sum(count * PACKED_BITS[kind] / 8 for kind, count in weights.items())


def flops_per_row(weights: Mapping[Kind, int]) -> int:
    """Operations that one row costs: a product and a sum per weight."""
    return 2 * sum(weights.values())


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of keys and values that one position of the context adds, in f16."""
    return 2 * config.n_layers * config.n_head_kv * config.head_dim * CACHE_BYTES


def launches(config: ModelConfig, *, both_views: bool) -> int:
    """Kernels of a pass."""
    per_layer = LAUNCHES_PER_LAYER_BOTH if both_views else LAUNCHES_PER_LAYER
    return config.n_layers * per_layer + LAUNCHES_PER_PASS


def product_shapes(config: ModelConfig, views: int) -> list[tuple[int, int, int]]:
    """Columns, k and how often, of the products of a pass of so many views."""
    c, heads = config, config.n_head * config.head_dim
    attention = views * c.n_layers
    return [
        (heads + 2 * c.n_head_kv * c.head_dim, c.n_embd, attention),
        (c.n_embd, heads, attention),
        (2 * c.n_ff, c.n_embd, c.n_layers),
        (c.n_embd, c.n_ff, c.n_layers),
        (c.n_vocab, c.n_embd, 1),
    ]


def split_for(columns: int) -> int:
    """Parts of k that a product sums apart (`orthrus_kernels.products.dispatch.split_for`, for
    matrices that are not tiny)."""
    tiles = -(-columns // 64)
    return 1 if tiles >= 192 else 2 if tiles >= 96 else 4 if tiles >= 48 else 8
