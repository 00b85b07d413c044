"""ModelFile → `Weights`: one matrix at a time, reading ahead while the device packs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from orthrus_kernels.attention.finish_qkv import HeadWeights
from orthrus_kernels.packing.pack import interleave_rows, pack, stack_rows
from orthrus_kernels.packing.quant_tensor import QuantTensor, row_bytes
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import Pairing
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile, WeightFile
from orthrus_gguf.model.hybrid import CONV_KERNEL
from orthrus_gguf.model.tensors import TOKEN_EMBD, in_view
from orthrus_gguf.runtime.cuda.staging import StagedReader
from orthrus_gguf.runtime.cuda.weight_plan import (
    DELTA_VECTORS,
    DeltaPlan,
    Join,
    LayerPlan,
    MatrixPlan,
    ProductPlan,
    WeightPlan,
    embedding_type,
)
from orthrus_gguf.runtime.cuda.weights import DeltaNet, Embedding, Layer, Product, Weights
from orthrus_gguf.runtime.protocol import OWN_VIEWS, View

log = logging.getLogger(__name__)

_T = GGMLQuantizationType

#: Called with the bytes read so far and in all.
Progress = Callable[[int, int], None]

#: Weights dequantized at a time, for types without a kernel: 4 bytes each on the host.
DEQUANTIZE_WEIGHTS = 1 << 23


def load_weights(
    file: ModelFile,
    plan: WeightPlan,
    device: torch.device,
    *,
    on_progress: Progress | None = None,
    reader: StagedReader | None = None,
) -> Weights:
    """Read, copy and pack all matrices of `plan`.

    reader: must yield `reading_order(plan)`; by default one with slots of the usual size.
    Raises OrthrusError for weights that the kernels cannot hold.
    """
    names = reading_order(plan)
    reader = StagedReader(file, names, device) if reader is None else reader
    pieces = iter(reader)
    total = sum(file.tensors[name].n_bytes for name in names)
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        found, raw = next(pieces)
        if found != name:
            raise ValueError(f"expected tensor {name} next, found {found}")
        done += raw.numel()
        if on_progress is not None:
            on_progress(done, total)
        return raw

    packed: dict[MatrixPlan, QuantTensor] = {}
    try:
        table = read(TOKEN_EMBD)
        embedding = _embedding(file, TOKEN_EMBD, table)
        for matrix in plan.matrices():
            if matrix.names == (TOKEN_EMBD,):
                parts = [table]  # a tied head: the same bytes, packed
            else:
                parts = [read(name) for name in matrix.names]
            packed[matrix] = _packed(matrix, parts, file)
    finally:
        pieces.close()  # type: ignore[attr-defined]  # a generator: ends the reader's thread
    _report_converted(plan.matrices())
    vectors = load_vectors(file, plan.vectors, device)
    return assemble(file.config, plan, packed, vectors, embedding)


def load_matrices(
    file: WeightFile, matrices: Sequence[MatrixPlan], device: torch.device
) -> dict[MatrixPlan, QuantTensor]:
    """Read, copy and pack some matrices. Raises OrthrusError for weights that the kernels cannot
    hold."""
    names = [name for matrix in matrices for name in matrix.names]
    pieces = iter(StagedReader(file, names, device))
    try:
        packed = {
            matrix: _packed(matrix, [next(pieces)[1] for _ in matrix.names], file)
            for matrix in matrices
        }
    finally:
        pieces.close()  # type: ignore[attr-defined]  # a generator: ends the reader's thread
    _report_converted(matrices)
    return packed


def load_vectors(file: WeightFile, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """Norms and biases, f32, by name."""
    return {name: _vector(file, name).to(device) for name in names}


def reading_order(plan: WeightPlan) -> list[str]:
    """Names of the matrices in the order in which they are read, each once."""
    names = [TOKEN_EMBD]
    names += [name for matrix in plan.matrices() for name in matrix.names if name != TOKEN_EMBD]
    return names


def _packed(matrix: MatrixPlan, parts: list[Tensor], file: WeightFile) -> QuantTensor:
    label = "+".join(matrix.names)
    raw = [part.view(-1, row_bytes(matrix.stored, matrix.k)) for part in parts]
    if matrix.packed is not matrix.stored:
        raw = [_as_f16(part, matrix.stored, matrix.k, label, file) for part in raw]
    joined = interleave_rows(*raw) if matrix.join is Join.PAIRS else stack_rows(raw)
    try:
        return pack(joined, matrix.packed, matrix.k, matrix.layout, label)
    except ValueError as error:
        raise OrthrusError(f"{file.paths[0]}: {error}") from error


def _as_f16(
    raw: Tensor, stored: GGMLQuantizationType, k: int, label: str, file: WeightFile
) -> Tensor:
    """GGUF rows of a type without a kernel → F16 rows, u8 [rows, 2k], in chunks of rows."""
    chunk = max(1, DEQUANTIZE_WEIGHTS // k)
    pieces = []
    for start in range(0, raw.shape[0], chunk):
        values = dequantize(raw[start : start + chunk].cpu().numpy(), stored)
        with np.errstate(over="ignore"):
            half = np.asarray(values, np.float16)
        if not np.isfinite(half).all():
            raise OrthrusError(
                f"{file.paths[0]}: {label}: {stored.name} weights reach {np.abs(values).max():.3g},"
                " beyond F16, and the cuda runtime has no kernel for that type; convert to Q8_0"
            )
        pieces.append(torch.from_numpy(half.view(np.uint8).reshape(len(half), -1)).to(raw.device))
    return torch.cat(pieces)


def _report_converted(matrices: Iterable[MatrixPlan]) -> None:
    """One log line per type that has no kernel: how many matrices, and what it costs."""
    stored: Counter[GGMLQuantizationType] = Counter()
    before: Counter[GGMLQuantizationType] = Counter()
    after: Counter[GGMLQuantizationType] = Counter()
    for matrix in matrices:
        if matrix.packed is not matrix.stored:
            stored[matrix.stored] += 1
            before[matrix.stored] += matrix.raw_bytes
            after[matrix.stored] += matrix.nbytes
    for kind, count in stored.items():
        log.warning(
            "%d matrices of type %s have no kernel: dequantized to F16, %.1f MB instead of %.1f MB",
            count,
            kind.name,
            after[kind] / 1e6,
            before[kind] / 1e6,
        )


def load_embedding(file: WeightFile, name: str, device: torch.device) -> Embedding:
    """Read and copy an embedding. Raises OrthrusError for weights that the kernels cannot hold."""
    ((_, raw),) = StagedReader(file, [name], device)
    return _embedding(file, name, raw)


def empty_embedding(
    kind: GGMLQuantizationType, rows: int, columns: int, device: torch.device
) -> Embedding:
    """The same without numbers."""
    size = row_bytes(kind, columns)
    return Embedding(torch.empty(rows, size, dtype=torch.uint8, device=device), kind.name)


def _embedding(file: WeightFile, name: str, raw: Tensor) -> Embedding:
    stored, k = file.tensors[name].type, file.tensors[name].shape[1]
    rows, kept = raw.view(-1, row_bytes(stored, k)), embedding_type(stored)
    if kept is not stored:
        rows = _as_f16(rows, stored, k, name, file)
    return Embedding(rows, kept.name)


def _vector(file: WeightFile, name: str) -> Tensor:
    """A norm or a bias, f32."""
    values = dequantize(file.data(name).reshape(1, -1), file.tensors[name].type)
    return torch.from_numpy(np.array(values, np.float32).reshape(-1))


def assemble(
    config: ModelConfig,
    plan: WeightPlan,
    packed: Mapping[MatrixPlan, QuantTensor],
    vectors: Mapping[str, Tensor],
    embedding: Embedding,
) -> Weights:
    """Everything in its place. vectors: norms and biases, by name."""

    def product(wanted: ProductPlan) -> Product:
        matrices = tuple(packed[matrix] for matrix in wanted.matrices)
        return Product(matrices, wanted.split, wanted.layout)

    def by_view(wanted: Mapping[View, ProductPlan]) -> dict[View, Product]:
        return {view: product(part) for view, part in wanted.items()}

    kinds, suffixes = config.layer_kinds, plan.suffixes.values()

    def delta_net(prefix: str, wanted: DeltaPlan) -> DeltaNet:
        conv, a, dt, norm = (
            torch.stack([vectors[prefix + in_view(name, suffix)] for suffix in suffixes])
            for name in DELTA_VECTORS
        )
        inputs, conv = tuple(map(by_view, wanted.inputs)), conv.view(len(conv), -1, CONV_KERNEL)
        return DeltaNet(inputs, conv, a, dt, norm, by_view(wanted.output))

    def layer(index: int, wanted: LayerPlan) -> Layer:
        prefix, delta = f"blk.{index}.", wanted.delta_net
        return Layer(
            kinds[:index].count(kinds[index]),
            vectors[prefix + "attn_norm.weight"],
            _head_weights(config, vectors, prefix, {} if delta else plan.suffixes),
            by_view(wanted.qkv),
            by_view(wanted.output),
            vectors[f"{prefix}{config.architecture.mlp_norm}.weight"],
            product(wanted.gate_up),
            product(wanted.down),
            None if delta is None else delta_net(prefix, delta),
        )

    layers = tuple(layer(index, wanted) for index, wanted in enumerate(plan.layers))
    return Weights(embedding, layers, vectors["output_norm.weight"], product(plan.head))


def _head_weights(
    config: ModelConfig, vectors: Mapping[str, Tensor], prefix: str, named: Mapping[View, str]
) -> HeadWeights:
    """Norms and biases of both views. Without heads the second view's are never read, but have a
    place. named: suffixes of the views' tensors; a layer without attention has none."""
    arch = config.architecture
    suffixes = [named.get(view, "") for view in OWN_VIEWS]
    norms = biases = None
    if arch.qk_norms and named:
        norms = torch.stack(
            [
                torch.stack([vectors[f"{prefix}attn_{part}_norm{suffix}.weight"] for part in "qk"])
                for suffix in suffixes
            ]
        )
    if arch.qkv_biases and named:
        biases = torch.stack(
            [
                torch.cat([vectors[f"{prefix}attn_{part}{suffix}.bias"] for part in "qkv"])
                for suffix in suffixes
            ]
        )
    adjacent = arch.pairing is Pairing.ADJACENT
    return HeadWeights(norms, biases, adjacent, config.rms_eps, gated=arch.hybrid)
