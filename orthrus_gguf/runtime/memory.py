"""The memory that a model needs on the CPU, on the runtime that `--runtime cpu` takes for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orthrus_cpu_kernels.library import Kernels

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cache_layout import cache_layout
from orthrus_gguf.runtime.cpu import memory as native
from orthrus_gguf.runtime.ggml import memory as ggml
from orthrus_gguf.runtime.limits import usable_cores
from orthrus_gguf.runtime.load import kernels_for


@dataclass(frozen=True)
class CpuMemory:
    """Bytes: of a tensor; of a cache and of buffers, for a context of so many tokens.

    runtime: `cpu` or `ggml`. row_bytes: of a token in the cache.
    """

    runtime: str
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
    if isinstance(kernels, str):  # weights are used where the file's mapping holds them
        return CpuMemory(
            "ggml",
            layout.row_bytes(),
            lambda info: info.n_bytes,
            lambda context: ggml.cache_bytes(config, layout, context),
            lambda context: ggml.buffer_bytes(config, layout, context),
        )
    buffers = native.buffer_bytes(kernels, config, usable_cores())
    return CpuMemory(
        "cpu",
        layout.row_bytes(),
        lambda info: native.weight_bytes(kernels, info),
        lambda context: native.cache_bytes(config, layout, context),
        lambda _: buffers,
    )
