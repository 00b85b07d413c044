"""The model's weights, repacked for the native kernels."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import LANES, REPACK, Kernels, Matrix, Step, steps_array

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import WeightFile
from orthrus_gguf.model.hybrid import CONV_KERNEL
from orthrus_gguf.model.tensors import (
    DELTA_NET,
    OUTPUT,
    OUTPUT_NORM,
    TOKEN_EMBD,
    in_view,
    original_of,
)
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.cpu.pool import Part, Pool
from orthrus_gguf.runtime.limits import private_memory
from orthrus_gguf.runtime.protocol import View

#: Of a DeltaNet, its taps [channels, kernel], which are few; of attention, whose heads have gates.
_CONV, _QUERIES = DELTA_NET["conv"], "attn_q.weight"

#: Panels that one task of repacking takes.
PANELS = 16

#: Bytes of a file that are repacked in one go: they are in memory twice until it ends.
PART = 1 << 25

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Attention:
    """One view's attention of one layer. Biases are of q, k and v; norms of heads. gate: of its
    output, where the architecture has one."""

    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix
    biases: tuple[Floats | None, Floats | None, Floats | None]
    q_norm: Floats | None
    k_norm: Floats | None
    gate: Matrix | None = None


@dataclass(frozen=True)
class DeltaNet:
    """A gated DeltaNet. conv: [channels / 16, taps, 16]. a, dt: of value heads, to whole panels."""

    qkv: Matrix
    gate: Matrix
    alpha: Matrix
    beta: Matrix
    out: Matrix
    conv: Floats
    a: Floats
    dt: Floats
    norm: Floats


@dataclass(frozen=True)
class Layer:
    """One layer: views of attention, or of a DeltaNet in its place; all else is shared.

    place: among the layers of its kind.
    """

    place: int
    attention: dict[View, Attention]
    delta_net: dict[View, DeltaNet]
    attn_norm: Floats
    ffn_norm: Floats
    gate: Matrix
    up: Matrix
    down: Matrix


def why_not(config: ModelConfig, tensors: Mapping[str, TensorInfo], kernels: Kernels) -> str | None:
    """What keeps a model from the native kernels, in words; None if nothing does."""
    sizes = [(config.n_embd, "rows"), (config.head_dim, "heads"), (config.n_ff, "MLP")]
    if config.hybrid is not None:
        sizes.append((config.hybrid.head_dim, "DeltaNet heads"))
    for size, what in sizes:
        if size % LANES:
            return f"{what} of {size} elements are no multiple of {LANES}"
    for info in tensors.values():
        if is_packed(config, info) and kernels.form(int(info.type)) is None:
            return f"{info.name} is {info.type.name}, which they have no product for"
    return None


def is_packed(config: ModelConfig, info: TensorInfo) -> bool:
    """Whether a tensor is repacked: not vectors, nor the taps of convolutions."""
    taps = original_of(info.name).endswith(_CONV)
    return is_used(config, info) and len(info.shape) > 1 and not taps


def is_used(config: ModelConfig, info: TensorInfo) -> bool:
    """Whether a tensor is loaded: an MTP block is not."""
    return not info.name.startswith(f"blk.{config.n_layers}.")


def packed_bytes(kernels: Kernels, info: TensorInfo) -> int:
    """Bytes of a matrix in panels."""
    panels = -(-info.shape[0] // LANES)
    return -(-panels * kernels.panel_bytes(int(info.type), info.shape[1]) // 64) * 64


class Weights:
    """All weights of a model: matrices in panels, in one block of memory; norms as floats.

    types: of the matrices. They are filled in the background, by the pool's threads: what a pool
    runs afterwards finds them whole.
    """

    def __init__(self, file: WeightFile, kernels: Kernels, pool: Pool) -> None:
        """Raises OrthrusError when memory does not suffice."""
        self._kernels = kernels
        packed = [info for info in file.tensors.values() if is_packed(file.config, info)]
        self.types = frozenset(info.type for info in packed)
        sizes = {info.name: packed_bytes(kernels, info) for info in packed}
        total = sum(sizes.values())
        try:
            self._memory = private_memory(max(total, 1))
        except OSError as error:
            raise OrthrusError(
                f"{file.paths[0]}: {total / 2**30:.1f} GiB for repacked weights cannot be"
                " allocated; use --runtime ggml, which uses them where they lie in the file"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer page faults now, fewer TLB misses later
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._block = np.frombuffer(self._memory, np.uint8)
        self._matrices: dict[str, Matrix] = {}
        at = self._block.ctypes.data
        for info in packed:
            panels = -(-info.shape[0] // LANES)
            shape = int(info.type), info.shape[1], info.shape[0], panels
            self._matrices[info.name] = Matrix(*shape, at)
            at += sizes[info.name]
        pool.run_in_background(list(self._parts(file, packed)))
        self._arrange(file)

    def close(self) -> None:
        """Let go of the memory; matrices must not be used afterwards."""
        self._matrices.clear()
        del self._block, self._memory

    def _arrange(self, file: WeightFile) -> None:
        """Which tensor is what."""
        self.token_embd = self._matrices[TOKEN_EMBD]
        self.output = self._matrices.get(OUTPUT, self.token_embd)
        heads = {View.DIFFUSION: "_diff"} if file.config.has_heads else {}
        self._arrange_layers(file, {View.AR: "", **heads})

    def _arrange_layers(self, file: WeightFile, views: Mapping[View, str]) -> None:
        """views: each with the suffix of its tensors."""
        self.output_norm = vector(file, OUTPUT_NORM)
        self.layers = [self._layer(file, index, views) for index in range(file.config.n_layers)]

    def _parts(self, file: WeightFile, infos: Sequence[TensorInfo]) -> Iterator[Part]:
        """What fills the matrices: steps for some of them, behind which the file's own copy may
        leave the memory."""
        steps: list[Step] = []
        read: dict[str, NDArray[np.uint8]] = {}
        for info in infos:
            read[info.name] = file.data(info.name)
            steps += self._repacking(file.config, info, read[info.name])
            if sum(data.nbytes for data in read.values()) >= PART or info is infos[-1]:
                # The function keeps alive what the steps point to.
                yield steps_array(steps), partial(_release, file, read, self._block)
                steps, read = [], {}

    def _repacking(
        self, config: ModelConfig, info: TensorInfo, data: NDArray[np.uint8]
    ) -> Iterator[Step]:
        """Steps that fill a matrix."""
        matrix, raw = self._matrices[info.name], data.ctypes.data
        runs = [(0, 0, matrix.panels)]
        if _gated(config, info):
            each = config.head_dim // LANES
            runs = _apart(matrix.panels // each, each)
        for source, first, stop in runs:
            moved = (source - first) * LANES * (info.n_bytes // matrix.columns)
            step = Step(op=REPACK, first=first, count=stop - first, width=PANELS, x=raw + moved)
            step.tasks, step.matrix[0] = -(-(stop - first) // PANELS), matrix
            yield step

    def _layer(self, file: WeightFile, index: int, views: Mapping[View, str]) -> Layer:
        prefix, config = f"blk.{index}.", file.config
        kinds = config.layer_kinds
        attention: dict[View, Attention] = {}
        delta_net: dict[View, DeltaNet] = {}
        for view, suffix in views.items():
            if kinds[index] is LayerKind.ATTENTION:
                attention[view] = self._attention(file, prefix, suffix)
            else:
                delta_net[view] = self._delta_net(file, prefix, suffix)
        return Layer(
            kinds[:index].count(kinds[index]),
            attention,
            delta_net,
            vector(file, f"{prefix}attn_norm.weight"),
            vector(file, f"{prefix}{config.architecture.mlp_norm}.weight"),
            *(self._matrices[f"{prefix}ffn_{name}.weight"] for name in ("gate", "up", "down")),
        )

    def _delta_net(self, file: WeightFile, prefix: str, suffix: str) -> DeltaNet:
        names = {part: prefix + in_view(name, suffix) for part, name in DELTA_NET.items()}
        conv = vector(file, names["conv"]).reshape(-1, LANES, CONV_KERNEL)
        matrices = ("qkv", "gate", "alpha", "beta", "out")
        return DeltaNet(
            **{part: self._matrices[names[part]] for part in matrices},
            conv=np.ascontiguousarray(conv.transpose(0, 2, 1)),
            a=_whole_panels(vector(file, names["a"])),
            dt=_whole_panels(vector(file, names["dt"])),
            norm=vector(file, names["norm"]),
        )

    def _attention(self, file: WeightFile, prefix: str, suffix: str) -> Attention:
        arch, gate = file.config.architecture, None
        q, k, v, output = (
            self._matrices[f"{prefix}attn_{name}{suffix}.weight"]
            for name in ("q", "k", "v", "output")
        )
        if arch.hybrid:
            q, gate = self._halves(q)
        biases = [
            vector(file, f"{prefix}attn_{name}{suffix}.bias") if arch.qkv_biases else None
            for name in "qkv"
        ]
        norms = [
            vector(file, f"{prefix}attn_{name}_norm{suffix}.weight") if arch.qk_norms else None
            for name in "qk"
        ]
        three = (biases[0], biases[1], biases[2])
        return Attention(q, k, v, output, three, norms[0], norms[1], gate)

    def _halves(self, both: Matrix) -> tuple[Matrix, Matrix]:
        """Queries and gates, which lie one behind the other."""
        halves = both.type, both.k, both.columns // 2, both.panels // 2
        bytes_ = both.panels // 2 * self._kernels.panel_bytes(both.type, both.k)
        return Matrix(*halves, both.data), Matrix(*halves, both.data + bytes_)


def _release(file: WeightFile, read: Mapping[str, NDArray[np.uint8]], *_: object) -> None:
    for name in read:
        file.release(name)


def _gated(config: ModelConfig, info: TensorInfo) -> bool:
    """Whether a tensor holds, head by head, queries and gates."""
    return config.architecture.hybrid and original_of(info.name).endswith(_QUERIES)


def _apart(heads: int, each: int) -> list[tuple[int, int, int]]:
    """Runs of panels (from, to, stop) that put every other head of `each` panels behind all the
    rest."""
    places = [(head % 2 * (heads // 2) + head // 2) * each for head in range(heads)]
    return [(head * each, place, place + each) for head, place in enumerate(places)]


def _whole_panels(values: Floats) -> Floats:
    return np.pad(values, (0, -len(values) % LANES))


def vector(file: WeightFile, name: str) -> Floats:
    """A tensor's values in a row, as floats."""
    info = file.tensors[name]
    data = file.data(name)
    if info.type == GGMLQuantizationType.F32:
        return data.view("<f4").astype(np.float32)
    from gguf import quants  # which no usual file needs

    values = quants.dequantize(data, GGMLQuantizationType(info.type))
    return np.array(values.reshape(math.prod(info.shape)), dtype=np.float32)
