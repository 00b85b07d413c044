"""Which packed matrices a model becomes: decided from the file's tensor table alone.

Matrices that read the same rows are joined where their types allow it, so that one launch computes
them: q, k and v; gate and up (`orthrus_kernels.packing.pack`). They also share one kind of
activations: int8 only where all of them want it, since rows exist in one form at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from gguf import GGMLQuantizationType
from orthrus_kernels.elementwise.embedding import QBLOCK_BYTES
from orthrus_kernels.packing.pack import PAIR_ROWS, empty_tensor
from orthrus_kernels.packing.quant_tensor import (
    PLAIN_TYPES,
    TRAITS,
    Layout,
    QuantTensor,
    row_bytes,
)
from orthrus_kernels.products.dispatch import layout_for, split_for

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.tensors import OUTPUT, OUTPUT_NORM, TOKEN_EMBD, in_view
from orthrus_gguf.runtime.protocol import View

_T = GGMLQuantizationType

#: Suffix of a view's tensors.
SUFFIX = {View.AR: "", View.DIFFUSION: "_diff"}


#: What a DeltaNet has beside its products: taps of the convolution, A, dt, norm.
DELTA_VECTORS = ("ssm_conv1d.weight", "ssm_a", "ssm_dt.bias", "ssm_norm.weight")


class Join(enum.Enum):
    """How the rows of several tensors become one matrix."""

    STACK = "one after the other"
    PAIRS = "in alternating groups of 8 rows"


@dataclass(frozen=True)
class MatrixPlan:
    """One packed matrix [rows, k]: the tensors that it joins, all of type `stored`."""

    names: tuple[str, ...]
    stored: GGMLQuantizationType
    rows: int
    k: int
    layout: Layout
    join: Join = Join.STACK

    @property
    def packed(self) -> GGMLQuantizationType:
        """Its type on the device: F16 where the stored one has no kernel."""
        return packed_type(self.stored)

    def empty(self, device: torch.device) -> QuantTensor:
        """Its planes, uninitialised; on the meta device they take no memory."""
        return empty_tensor(self.packed, self.rows, self.k, self.layout, device)

    @property
    def nbytes(self) -> int:
        """Bytes of its planes."""
        return self.empty(torch.device("meta")).nbytes

    @property
    def raw_bytes(self) -> int:
        """Bytes of its tensors in the file."""
        return self.rows * row_bytes(self.stored, self.k)


@dataclass(frozen=True)
class ProductPlan:
    """A product with one or more matrices, whose columns follow one another.

    split: parts of k that are summed apart (`dispatch.split_for`).
    """

    matrices: tuple[MatrixPlan, ...]
    split: int

    @property
    def layout(self) -> Layout:
        return self.matrices[0].layout

    @property
    def columns(self) -> int:
        return sum(matrix.rows for matrix in self.matrices)


@dataclass(frozen=True)
class DeltaPlan:
    """The products of a gated DeltaNet, by view. inputs: qkv and gate, then alpha and beta; two
    products where these want another form of the rows."""

    inputs: tuple[Mapping[View, ProductPlan], ...]
    output: Mapping[View, ProductPlan]


@dataclass(frozen=True)
class LayerPlan:
    """The products of one layer; attention by view, of which there is none beside a DeltaNet."""

    qkv: Mapping[View, ProductPlan]
    output: Mapping[View, ProductPlan]
    gate_up: ProductPlan
    down: ProductPlan
    delta_net: DeltaPlan | None = None

    def products(self) -> Iterator[ProductPlan]:
        """All of them."""
        yield from (*self.qkv.values(), *self.output.values())
        if self.delta_net is not None:
            for part in (*self.delta_net.inputs, self.delta_net.output):
                yield from part.values()
        yield from (self.gate_up, self.down)


@dataclass(frozen=True)
class WeightPlan:
    """All matrices of a model. embedding: its type on the device (raw qblocks, not packed).
    suffixes: of the tensors of each view."""

    layers: tuple[LayerPlan, ...]
    head: ProductPlan
    embedding: GGMLQuantizationType
    vectors: tuple[str, ...]
    suffixes: Mapping[View, str]

    def products(self) -> Iterator[ProductPlan]:
        """Every product, layer by layer."""
        for layer in self.layers:
            yield from layer.products()
        yield self.head

    def matrices(self) -> Iterator[MatrixPlan]:
        """Every packed matrix, in the order of loading."""
        for product in self.products():
            yield from product.matrices


def packed_type(stored: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that a matrix has on the device."""
    return stored if stored in TRAITS or stored in PLAIN_TYPES else _T.F16


def embedding_type(stored: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of the embedding on the device: F16 where the lookup cannot read the stored one."""
    return stored if stored.name in QBLOCK_BYTES else _T.F16


def plan_weights(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], capability: int
) -> WeightPlan:
    """The plan for a checked model (`ModelFile`) on a card of this compute capability."""
    suffixes = SUFFIX if config.has_heads else {View.AR: ""}
    head = plan_product(TOKEN_EMBD if config.tied else OUTPUT, tensors, capability)
    return WeightPlan(
        plan_layers(config, tensors, capability, suffixes),
        ProductPlan(head.matrices, 1),  # logits are read as they are
        embedding_type(tensors[TOKEN_EMBD].type),
        plan_vectors(config, suffixes),
        suffixes,
    )


def plan_layers(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    capability: int,
    suffixes: Mapping[View, str],
    *,
    q_apart: bool = False,
) -> tuple[LayerPlan, ...]:
    """Products of all layers. suffixes: of the tensors of each view; views with the same one share
    their products. q_apart: q is a matrix of its own, so that k and v can be had without it."""

    def mixing(index: int, *parts: str) -> dict[View, ProductPlan]:
        """The product with some of what mixes a layer's rows, by view."""
        names = _in_views(index, parts, suffixes)
        shared = _layout(chain.from_iterable(names.values()), tensors, capability)
        apart = q_apart and "attn_q.weight" in parts
        return {view: _stacked(part, tensors, shared, apart) for view, part in names.items()}

    def delta_net(index: int) -> DeltaPlan:
        wide, narrow = (
            ("attn_qkv.weight", "attn_gate.weight"),
            ("ssm_alpha.weight", "ssm_beta.weight"),
        )
        layouts = [
            _layout(chain.from_iterable(names.values()), tensors, capability)
            for names in (_in_views(index, parts, suffixes) for parts in (wide, narrow))
        ]
        pairs = [wide, narrow] if len({*layouts}) > 1 else [(*wide, *narrow)]
        inputs = tuple(mixing(index, *parts) for parts in pairs)
        return DeltaPlan(inputs, mixing(index, "ssm_out.weight"))

    layers = []
    for index, kind in enumerate(config.layer_kinds):
        ffn = [f"blk.{index}.ffn_{name}.weight" for name in ("gate", "up")]
        attends = kind is LayerKind.ATTENTION
        layers.append(
            LayerPlan(
                mixing(index, *(f"attn_{part}.weight" for part in "qkv")) if attends else {},
                mixing(index, "attn_output.weight") if attends else {},
                _gate_up(ffn, tensors, _layout(ffn, tensors, capability)),
                plan_product(f"blk.{index}.ffn_down.weight", tensors, capability),
                None if attends else delta_net(index),
            )
        )
    return tuple(layers)


def _in_views(
    index: int, parts: Sequence[str], suffixes: Mapping[View, str]
) -> dict[View, list[str]]:
    """Names of some tensors of a layer, by view."""
    return {
        view: [f"blk.{index}.{in_view(part, suffix)}" for part in parts]
        for view, suffix in suffixes.items()
    }


def plan_product(name: str, tensors: Mapping[str, TensorInfo], capability: int) -> ProductPlan:
    """The product with one tensor."""
    return _stacked([name], tensors, _layout([name], tensors, capability))


def _layout(names: Iterable[str], tensors: Mapping[str, TensorInfo], capability: int) -> Layout:
    """Of all matrices that read the same rows."""
    wanted = {layout_for(packed_type(tensors[name].type), capability) for name in names}
    return Layout.A8 if wanted == {Layout.A8} else Layout.A16


def _stacked(
    names: list[str], tensors: Mapping[str, TensorInfo], layout: Layout, first_apart: bool = False
) -> ProductPlan:
    """Neighbours of one type become one matrix; but the first, where it is to stand apart."""

    def kind(name: str) -> tuple[GGMLQuantizationType, bool]:
        return tensors[name].type, first_apart and name == names[0]

    matrices = []
    for (stored, _), group in groupby(names, key=kind):
        members = tuple(group)
        rows = sum(tensors[name].shape[0] for name in members)
        matrices.append(MatrixPlan(members, stored, rows, tensors[members[0]].shape[1], layout))
    columns = sum(matrix.rows for matrix in matrices)
    return ProductPlan(tuple(matrices), split_for(columns, matrices[0].k))


def _gate_up(names: list[str], tensors: Mapping[str, TensorInfo], layout: Layout) -> ProductPlan:
    """One matrix of pairs for the fused product, or two matrices where that is impossible."""
    gate, up = (tensors[name] for name in names)
    rows, k = gate.shape
    if gate.type == up.type and rows % PAIR_ROWS == 0:
        pair = MatrixPlan(tuple(names), gate.type, 2 * rows, k, layout, Join.PAIRS)
        return ProductPlan((pair,), 1)
    single = [MatrixPlan((info.name,), info.type, rows, k, layout) for info in (gate, up)]
    return ProductPlan(tuple(single), split_for(rows, k))


def plan_vectors(config: ModelConfig, suffixes: Mapping[View, str]) -> tuple[str, ...]:
    """Names of the norms and biases."""
    arch, names = config.architecture, []
    for index, kind in enumerate(config.layer_kinds):
        prefix = f"blk.{index}."
        names += [f"{prefix}{name}.weight" for name in ("attn_norm", arch.mlp_norm)]
        if kind is LayerKind.DELTA_NET:
            for view in _in_views(index, DELTA_VECTORS, suffixes).values():
                names += view
            continue
        for suffix in dict.fromkeys(suffixes.values()):
            if arch.qk_norms:
                names += [f"{prefix}attn_{part}_norm{suffix}.weight" for part in "qk"]
            if arch.qkv_biases:
                names += [f"{prefix}attn_{part}{suffix}.bias" for part in "qkv"]
    return (*names, OUTPUT_NORM)
