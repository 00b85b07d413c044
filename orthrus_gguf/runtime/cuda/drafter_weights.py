"""What a drafter's network takes on the device: its plan, its weights, the buffers of its own.

What the network learns of committed rows are rows of the AR view, and need k and v only. Blocks of
a DFlash drafter are rows of the diffusion view, of the same weights; chains of an MTP block are
rows of the AR view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from orthrus_kernels.attention.attention import Sight
from orthrus_kernels.packing.quant_tensor import QuantTensor
from orthrus_kernels.products.dispatch import split_for
from orthrus_kernels.products.matmul import Activations
from torch import Tensor

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import WeightFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.model.tensors import (
    FEATURES,
    FEATURES_NORM,
    MTP_EMBD,
    MTP_EMBD_NORM,
    MTP_HIDDEN_NORM,
    MTP_OUTPUT,
    MTP_PROJECTION,
)
from orthrus_gguf.model.window import Window
from orthrus_gguf.runtime.cuda.buffers import Buffers, new_buffers, new_rows, pass_rows
from orthrus_gguf.runtime.cuda.loader import (
    assemble,
    empty_embedding,
    load_embedding,
    load_matrices,
    load_vectors,
)
from orthrus_gguf.runtime.cuda.weight_plan import (
    MatrixPlan,
    ProductPlan,
    WeightPlan,
    embedding_type,
    plan_layers,
    plan_product,
    plan_vectors,
)
from orthrus_gguf.runtime.cuda.weights import Embedding, Product, Weights
from orthrus_gguf.runtime.protocol import View

#: Tensors of the views of a DFlash drafter, of an MTP block.
_BLOCKS = {View.AR: "", View.DIFFUSION: ""}
_CHAINS = {View.AR: ""}

#: Names in an MTP block (`MtpFile.tensors`).
_PROJECTION, _EMBEDDING, _OUTPUT, *_NORMS = (
    f"blk.0.{name}"
    for name in (MTP_PROJECTION, MTP_EMBD, MTP_OUTPUT, MTP_EMBD_NORM, MTP_HIDDEN_NORM)
)


@dataclass(frozen=True)
class DrafterPlan:
    """network: layers of its own; embedding and head of the target, unless it has its own.
    features: what makes one vector per row of what is joined: of what some layers of the target
    read, or of a token and what the last one gave. norms: names, of what comes out of that product,
    or of the two that go in. shared: the target's head. embedding: the name of its own. ids: the
    first rows of the head, of which drafts are made. sliding: what rows see in each layer, None
    where all.
    """

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    network: WeightPlan
    features: ProductPlan
    norms: tuple[str, ...]
    shared: ProductPlan
    embedding: str | None
    ids: int
    sliding: tuple[Sight | None, ...]

    def matrices(self) -> list[MatrixPlan]:
        """Those of its own, in the order of loading."""
        every = dict.fromkeys((*self.features.matrices, *self.network.matrices()))
        return [matrix for matrix in every if matrix not in self.shared.matrices]


@dataclass(frozen=True)
class DrafterWeights:
    """See `DrafterPlan`. injected: k and v of each layer."""

    network: Weights
    features: Product
    norms: tuple[Tensor, ...]
    injected: tuple[Product, ...]
    sliding: tuple[Sight | None, ...]


@dataclass(frozen=True)
class DrafterBuffers:
    """given: f32, what the host says of a row: taps side by side, or what the row before gave.
    joined: f32, what the features are made of; wide: the same, as their product reads it.
    sums, keys_values: f32 partials [split, rows, columns] of the features, and of k and v."""

    given: Tensor
    joined: Tensor
    wide: Activations
    sums: Tensor
    keys_values: Tensor


def plan_drafter(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    target: WeightPlan,
    capability: int,
    ids: int | None = None,
    window: Window | None = None,
) -> DrafterPlan:
    """The plan for a drafter of these checked tensors, of either kind, beside a target. ids: see
    `MtpFile.cut`."""
    blocks = FEATURES in tensors
    suffixes, features = (_BLOCKS, FEATURES) if blocks else (_CHAINS, _PROJECTION)
    norms = (FEATURES_NORM,) if blocks else tuple(_NORMS)
    head, embedding = target.head, target.embedding
    if _OUTPUT in tensors:
        head = ProductPlan(plan_product(_OUTPUT, tensors, capability).matrices, 1)
    if own := _EMBEDDING in tensors:
        embedding = embedding_type(tensors[_EMBEDDING].type)
    network = WeightPlan(
        plan_layers(config, tensors, capability, suffixes, q_apart=True),
        head,
        embedding,
        (*plan_vectors(config, suffixes), *norms),
        suffixes,
    )
    sliding: tuple[Sight | None, ...] = (None,) * config.n_layers
    if window is not None:
        sight = Sight(window.size, window.causal)
        sliding = tuple(sight if slides else None for slides in window.layers)
    return DrafterPlan(
        config, tensors, network, plan_product(features, tensors, capability), norms, target.head,
        _EMBEDDING if own else None, config.n_vocab if ids is None else ids, sliding,
    )  # fmt: skip


def plan_beside(file: DrafterFile | MtpFile, target: WeightPlan, capability: int) -> DrafterPlan:
    """The plan for an open drafter."""
    if isinstance(file, MtpFile):
        return plan_drafter(file.config, file.tensors, target, capability, file.ids)
    return plan_drafter(file.config, file.tensors, target, capability, window=file.window)


def load_drafter(
    file: WeightFile, plan: DrafterPlan, target: Weights, device: torch.device
) -> DrafterWeights:
    """Raises OrthrusError for weights that the kernels cannot hold."""
    packed = load_matrices(file, plan.matrices(), device)
    embedding = target.embedding
    if plan.embedding is not None:
        embedding = load_embedding(file, plan.embedding, device)
    vectors = load_vectors(file, plan.network.vectors, device)
    return _assembled(plan, packed, vectors, embedding, target)


def empty_drafter(plan: DrafterPlan, target: Weights, device: torch.device) -> DrafterWeights:
    """The same without numbers, for the meta device."""
    packed = {matrix: matrix.empty(device) for matrix in plan.matrices()}
    vectors = {
        name: torch.empty(plan.tensors[name].shape, device=device) for name in plan.network.vectors
    }
    embedding = target.embedding
    if plan.embedding is not None:
        rows, columns = plan.tensors[plan.embedding].shape
        embedding = empty_embedding(plan.network.embedding, rows, columns, device)
    return _assembled(plan, packed, vectors, embedding, target)


def _assembled(
    plan: DrafterPlan,
    packed: dict[MatrixPlan, QuantTensor],
    vectors: Mapping[str, Tensor],
    embedding: Embedding,
    target: Weights,
) -> DrafterWeights:
    packed |= dict(zip(plan.shared.matrices, target.head.matrices, strict=True))
    network = assemble(plan.config, plan.network, packed, vectors, embedding)
    features = tuple(packed[matrix] for matrix in plan.features.matrices)
    return DrafterWeights(
        replace(network, head=_first_rows(network.head, plan.ids)),
        Product(features, plan.features.split, plan.features.layout),
        tuple(vectors[name] for name in plan.norms),
        tuple(_without_q(layer.qkv[View.AR]) for layer in network.layers),
        plan.sliding,
    )


def _first_rows(head: Product, rows: int) -> Product:
    """A head of the first rows only; it shares their memory."""
    return replace(head, matrices=tuple(matrix.first_rows(rows) for matrix in head.matrices))


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
        logits = target.logits.view(-1)[: rows * plan.ids].view(rows, plan.ids)
        own = replace(own, logits=logits, sampling=target.sampling, codebook=target.codebook)
    wide, first = weights.features.k, weights.injected[0]
    joined = torch.zeros(rows, wide, device=device)
    chain = len(plan.norms) == 2
    buffers = DrafterBuffers(
        torch.zeros(rows, config.n_embd, device=device) if chain else joined,
        joined,
        new_rows(weights.features.layout, rows, wide, device),
        torch.empty(weights.features.split, rows, config.n_embd, device=device),
        torch.empty(first.split, rows, first.columns, device=device),
    )
    return own, buffers
