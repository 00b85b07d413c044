"""The model's weights, repacked for the native kernels."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import LANES, Kernels, Matrix

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import WeightFile
from orthrus_gguf.model.tensors import OUTPUT, OUTPUT_NORM, TOKEN_EMBD
from orthrus_gguf.runtime.limits import private_memory
from orthrus_gguf.runtime.protocol import View

#: Panels that one task of repacking takes.
PANELS = 16

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Attention:
    """One view's attention of one layer. Biases are of q, k and v; norms of heads."""

    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix
    biases: tuple[Floats | None, Floats | None, Floats | None]
    q_norm: Floats | None
    k_norm: Floats | None


@dataclass(frozen=True)
class Layer:
    """One layer; all but `attention` is shared by both views."""

    attention: dict[View, Attention]
    attn_norm: Floats
    ffn_norm: Floats
    gate: Matrix
    up: Matrix
    down: Matrix


def why_not(config: ModelConfig, tensors: Mapping[str, TensorInfo], kernels: Kernels) -> str | None:
    """What keeps a model from the native kernels, in words; None if nothing does."""
    for size, what in ((config.n_embd, "rows"), (config.head_dim, "heads"), (config.n_ff, "MLP")):
        if size % LANES:
            return f"{what} of {size} elements are no multiple of {LANES}"
    for info in tensors.values():
        if len(info.shape) > 1 and kernels.form(int(info.type)) is None:
            return f"{info.name} is {info.type.name}, which they have no product for"
    return None


def packed_bytes(kernels: Kernels, info: TensorInfo) -> int:
    """Bytes of a matrix in panels."""
    panels = -(-info.shape[0] // LANES)
    return -(-panels * kernels.panel_bytes(int(info.type), info.shape[1]) // 64) * 64


class Weights:
    """All weights of a model: matrices in panels, in one block of memory; norms as floats.

    types: of the matrices.
    """

    def __init__(self, file: WeightFile, kernels: Kernels, threads: int) -> None:
        """Raises OrthrusError when memory does not suffice."""
        self._kernels = kernels
        matrices = [info for info in file.tensors.values() if len(info.shape) > 1]
        self.types = frozenset(info.type for info in matrices)
        sizes = {info.name: packed_bytes(kernels, info) for info in matrices}
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
        at = 0
        with ThreadPoolExecutor(threads) as pool:
            for info in matrices:
                self._matrices[info.name] = self._place(file, info, at, pool)
                at += sizes[info.name]
                file.release(info.name)
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
        self.layers = [
            self._layer(file, f"blk.{index}.", views) for index in range(file.config.n_layers)
        ]

    def _place(
        self, file: WeightFile, info: TensorInfo, at: int, pool: ThreadPoolExecutor
    ) -> Matrix:
        columns, k = info.shape
        panels = -(-columns // LANES)
        raw, number = file.data(info.name), int(info.type)
        address = self._block.ctypes.data + at

        def repack(first: int) -> None:
            self._kernels.library.orthrus_repack(
                number, raw.ctypes.data, columns, k, first, min(first + PANELS, panels), address
            )

        list(pool.map(repack, range(0, panels, PANELS)))
        return Matrix(number, k, columns, panels, address)

    def _layer(self, file: WeightFile, prefix: str, views: Mapping[View, str]) -> Layer:
        return Layer(
            {view: self._attention(file, prefix, suffix) for view, suffix in views.items()},
            vector(file, f"{prefix}attn_norm.weight"),
            vector(file, f"{prefix}ffn_norm.weight"),
            *(self._matrices[f"{prefix}ffn_{name}.weight"] for name in ("gate", "up", "down")),
        )

    def _attention(self, file: WeightFile, prefix: str, suffix: str) -> Attention:
        arch = file.config.architecture
        q, k, v, output = (
            self._matrices[f"{prefix}attn_{name}{suffix}.weight"]
            for name in ("q", "k", "v", "output")
        )
        biases = [
            vector(file, f"{prefix}attn_{name}{suffix}.bias") if arch.qkv_biases else None
            for name in "qkv"
        ]
        norms = [
            vector(file, f"{prefix}attn_{name}_norm{suffix}.weight") if arch.qk_norms else None
            for name in "qk"
        ]
        return Attention(q, k, v, output, (biases[0], biases[1], biases[2]), norms[0], norms[1])


def vector(file: WeightFile, name: str) -> Floats:
    """A tensor of one dimension as floats."""
    info = file.tensors[name]
    data = quants.dequantize(file.data(name), GGMLQuantizationType(info.type))
    return np.array(data.reshape(math.prod(info.shape)), dtype=np.float32)
