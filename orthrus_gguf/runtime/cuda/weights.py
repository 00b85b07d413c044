"""The weights of a model on the device, in the packed layouts of `orthrus_kernels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orthrus_kernels.attention.finish_qkv import HeadWeights
from orthrus_kernels.packing.quant_tensor import Layout, QuantTensor
from torch import Tensor

from orthrus_gguf.runtime.protocol import OWN_VIEWS, View


@dataclass(frozen=True)
class Product:
    """Matrices that one product reads, their columns one after the other (`ProductPlan`)."""

    matrices: tuple[QuantTensor, ...]
    split: int
    layout: Layout

    @property
    def columns(self) -> int:
        return sum(matrix.rows for matrix in self.matrices)

    @property
    def k(self) -> int:
        return self.matrices[0].k


@dataclass(frozen=True)
class DeltaNet:
    """A gated DeltaNet. inputs, output: see `DeltaPlan`. Of each view: conv f32 [views, channels,
    taps]; a, dt f32 [views, value heads]; norm f32 [views, head_dim]."""

    inputs: tuple[Mapping[View, Product], ...]
    conv: Tensor
    a: Tensor
    dt: Tensor
    norm: Tensor
    output: Mapping[View, Product]


@dataclass(frozen=True)
class Layer:
    """One layer: views of attention, or a DeltaNet in their place; all else is shared.

    place: among the layers of its kind. heads: what happens between q, k and v and attention.
    """

    place: int
    attn_norm: Tensor
    heads: HeadWeights
    qkv: Mapping[View, Product]
    output: Mapping[View, Product]
    ffn_norm: Tensor
    gate_up: Product
    down: Product
    delta_net: DeltaNet | None = None

    def products(self, views: Sequence[View] = OWN_VIEWS) -> list[Product]:
        """Those that some views read."""
        mixing, net = [self.qkv, self.output], self.delta_net
        if net is not None:
            mixing += [*net.inputs, net.output]
        found = [by_view[v] for by_view in mixing for v in views if v in by_view]
        return [*found, self.gate_up, self.down]

    def vectors(self) -> list[Tensor]:
        """Norms, biases and the like."""
        own = [self.attn_norm, self.heads.norms, self.heads.biases, self.ffn_norm]
        if self.delta_net is not None:
            net = self.delta_net
            own += [net.conv, net.a, net.dt, net.norm]
        return [vector for vector in own if vector is not None]


@dataclass(frozen=True)
class Embedding:
    """Rows of qblocks, u8 [n_vocab, row bytes], and the name of their type."""

    table: Tensor
    type_name: str


@dataclass(frozen=True)
class Weights:
    """Everything that a pass reads."""

    embedding: Embedding
    layers: tuple[Layer, ...]
    output_norm: Tensor
    head: Product

    def products(self) -> list[Product]:
        """Every product of the model."""
        return [self.head, *(part for layer in self.layers for part in layer.products())]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        vectors = [vector for layer in self.layers for vector in layer.vectors()]
        tensors = [self.embedding.table, self.output_norm, *vectors]
        packed = sum(m.nbytes for product in self.products() for m in product.matrices)
        return packed + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def ar_pass_bytes(self) -> int:
        """Bytes of matrices that one AR pass reads, the head included, the embedding not."""
        products = [self.head]
        for layer in self.layers:
            products += layer.products((View.AR,))
        return sum(matrix.nbytes for product in products for matrix in product.matrices)
