"""The memory that a model needs on the CPU, on the runtime that `--runtime cpu` takes for it.

Hybrids, which ggml does not run here, have the reference runtime in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orthrus_cpu_kernels.library import Kernels

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.hybrid import Hybrid
from orthrus_gguf.runtime.cache_layout import cache_layout
from orthrus_gguf.runtime.cpu import memory as native
from orthrus_gguf.runtime.ggml import memory as ggml
from orthrus_gguf.runtime.limits import usable_cores
from orthrus_gguf.runtime.load import kernels_for


@dataclass(frozen=True)
class CpuMemory:
    """Bytes: of a tensor; of a cache and of buffers, for a context of so many tokens.

    runtime: `cpu`, `ggml` or `reference`. row_bytes: of a token in the cache. types: of its keys
    and values.
    """

    runtime: str
    types: tuple[str, str]
    row_bytes: float
    weight: Callable[[TensorInfo], int]
    cache: Callable[[int], int]
    buffers: Callable[[int], int]


def cpu_memory(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    type_k: str,
    type_v: str,
    kernels: Kernels | str | None = None,
) -> CpuMemory:
    """What a model needs, with these cache types. Raises OrthrusError for types it cannot use.

    kernels: to assume; words stand for ggml. None: as this machine would run it.
    """
    layout = cache_layout(config, type_k, type_v)
    kernels = kernels_for(config, tensors) if kernels is None else kernels
    if isinstance(kernels, str) and config.hybrid is not None:
        return _on_reference(config, config.hybrid)
    if isinstance(kernels, str):  # weights are used where the file's mapping holds them
        return CpuMemory(
            "ggml",
            (type_k, type_v),
            layout.row_bytes(),
            lambda info: info.n_bytes,
            lambda context: ggml.cache_bytes(config, layout, context),
            lambda context: ggml.buffer_bytes(config, layout, context),
        )
    buffers = native.buffer_bytes(kernels, config, usable_cores())
    return CpuMemory(
        "cpu",
        (type_k, type_v),
        layout.row_bytes(),
        lambda info: native.weight_bytes(kernels, config, info),
        lambda context: native.cache_bytes(config, layout, context),
        lambda _: buffers,
    )


def _on_reference(config: ModelConfig, hybrid: Hybrid) -> CpuMemory:
    """Everything in single precision; an MTP block is not loaded. What passes need is small."""
    row = cache_layout(config, "f32", "f32").row_bytes()
    state, block = hybrid.state_bytes(config.n_layers), f"blk.{config.n_layers}."
    return CpuMemory(
        "reference",
        ("f32", "f32"),
        row,
        lambda info: 0 if info.name.startswith(block) else 4 * math.prod(info.shape),
        lambda context: int(context * row) + state,
        lambda _: 0,
    )
