"""The weights of a model on the device, in the packed layouts of `orthrus_kernels`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orthrus_kernels.attention.finish_qkv import HeadWeights
from orthrus_kernels.packing.quant_tensor import Layout, QuantTensor
from torch import Tensor

from orthrus_gguf.runtime.protocol import View


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
class Layer:
    """One transformer layer. heads: what happens between q, k and v and attention."""

    attn_norm: Tensor
    heads: HeadWeights
    qkv: Mapping[View, Product]
    output: Mapping[View, Product]
    ffn_norm: Tensor
    gate_up: Product
    down: Product


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
        found = [self.head]
        for layer in self.layers:
            found += [*layer.qkv.values(), *layer.output.values(), layer.gate_up, layer.down]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        vectors = [self.output_norm]
        for layer in self.layers:
            own = (layer.attn_norm, layer.heads.norms, layer.heads.biases, layer.ffn_norm)
            vectors += [vector for vector in own if vector is not None]
        tensors = [self.embedding.table, *vectors]
        packed = sum(m.nbytes for product in self.products() for m in product.matrices)
        return packed + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def ar_pass_bytes(self) -> int:
        """Bytes of matrices that one AR pass reads, the head included, the embedding not."""
        products = [self.head]
        for layer in self.layers:
            products += [layer.qkv[View.AR], layer.output[View.AR], layer.gate_up, layer.down]
        return sum(matrix.nbytes for product in products for matrix in product.matrices)
