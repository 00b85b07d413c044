"""What a drafter's network takes on the device: its plan, its weights, the buffers of its own.

Blocks are rows of the diffusion view, and what the network learns of committed rows are rows of the
AR view: both have the same weights, and the second needs k and v only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from orthrus_kernels.packing.quant_tensor import QuantTensor
from orthrus_kernels.products.dispatch import split_for
from orthrus_kernels.products.matmul import Activations
from torch import Tensor

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import WeightFile
from orthrus_gguf.model.tensors import FEATURES, FEATURES_NORM
from orthrus_gguf.runtime.cuda.buffers import Buffers, new_buffers, new_rows, pass_rows
from orthrus_gguf.runtime.cuda.loader import assemble, load_matrices, load_vectors
from orthrus_gguf.runtime.cuda.weight_plan import (
    MatrixPlan,
    ProductPlan,
    WeightPlan,
    plan_layers,
    plan_product,
    plan_vectors,
)
from orthrus_gguf.runtime.cuda.weights import Product, Weights
from orthrus_gguf.runtime.protocol import View

#: Tensors of both views.
_SUFFIXES = {View.AR: "", View.DIFFUSION: ""}


@dataclass(frozen=True)
class DrafterPlan:
    """network: layers of its own, embedding and head of the target. features: what makes one vector
    per row of what the target's layers read."""

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    network: WeightPlan
    features: ProductPlan

    def matrices(self) -> list[MatrixPlan]:
        """Those of its own, in the order of loading."""
        every = dict.fromkeys((*self.features.matrices, *self.network.matrices()))
        return [matrix for matrix in every if matrix not in self.network.head.matrices]


@dataclass(frozen=True)
class DrafterWeights:
    """See `DrafterPlan`. injected: k and v of each layer."""

    network: Weights
    features: Product
    features_norm: Tensor
    injected: tuple[Product, ...]


@dataclass(frozen=True)
class DrafterBuffers:
    """joined: f32, taps of a row side by side; wide: the same, as the features' product reads them.
    sums, keys_values: f32 partials [split, rows, columns] of the features, and of k and v."""

    joined: Tensor
    wide: Activations
    sums: Tensor
    keys_values: Tensor


def plan_drafter(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], target: WeightPlan, capability: int
) -> DrafterPlan:
    """The plan for a drafter of these checked tensors, beside a target."""
    network = WeightPlan(
        plan_layers(config, tensors, capability, _SUFFIXES, q_apart=True),
        target.head,
        target.embedding,
        (*plan_vectors(config, _SUFFIXES), FEATURES_NORM),
        _SUFFIXES,
    )
    return DrafterPlan(config, tensors, network, plan_product(FEATURES, tensors, capability))


def plan_beside(file: DrafterFile, target: WeightPlan, capability: int) -> DrafterPlan:
    """The plan for an open drafter."""
    return plan_drafter(file.config, file.tensors, target, capability)


def load_drafter(
    file: WeightFile, plan: DrafterPlan, target: Weights, device: torch.device
) -> DrafterWeights:
    """Raises OrthrusError for weights that the kernels cannot hold."""
    packed = load_matrices(file, plan.matrices(), device)
    return _assembled(plan, packed, load_vectors(file, plan.network.vectors, device), target)


def empty_drafter(plan: DrafterPlan, target: Weights, device: torch.device) -> DrafterWeights:
    """The same without numbers, for the meta device."""
    packed = {matrix: matrix.empty(device) for matrix in plan.matrices()}
    vectors = {
        name: torch.empty(plan.tensors[name].shape, device=device) for name in plan.network.vectors
    }
    return _assembled(plan, packed, vectors, target)


def _assembled(
    plan: DrafterPlan,
    packed: dict[MatrixPlan, QuantTensor],
    vectors: Mapping[str, Tensor],
    target: Weights,
) -> DrafterWeights:
    packed |= dict(zip(plan.network.head.matrices, target.head.matrices, strict=True))
    network = assemble(plan.config, plan.network, packed, vectors, target.embedding)
    features = tuple(packed[matrix] for matrix in plan.features.matrices)
    return DrafterWeights(
        network,
        Product(features, plan.features.split, plan.features.layout),
        vectors[FEATURES_NORM],
        tuple(_without_q(layer.qkv[View.DIFFUSION]) for layer in network.layers),
    )


def _without_q(qkv: Product) -> Product:
    columns = sum(matrix.rows for matrix in qkv.matrices[1:])
    return replace(qkv, matrices=qkv.matrices[1:], split=split_for(columns, qkv.k))


def new_drafter_buffers(
    plan: DrafterPlan, weights: DrafterWeights, target: Buffers, device: torch.device
) -> tuple[Buffers, DrafterBuffers]:
    """Buffers of its passes, which are never under way beside the target's: what comes behind the
    layers is the target's, unless its blocks are larger."""
    config, rows = plan.config, pass_rows(plan.config)
    own = new_buffers(config, plan.network, device)
    if len(target.logits) >= rows:
        own = replace(
            own, hidden=target.hidden, logits=target.logits, sampling=target.sampling,
            codebook=target.codebook,
        )  # fmt: skip
    wide, first = weights.features.k, weights.injected[0]
    buffers = DrafterBuffers(
        torch.zeros(rows, wide, device=device),
        new_rows(weights.features.layout, rows, wide, device),
        torch.empty(weights.features.split, rows, config.n_embd, device=device),
        torch.empty(first.split, rows, first.columns, device=device),
    )
    return own, buffers
