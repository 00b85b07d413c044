"""The CUDA runtime on the CPU, for tests: its kernels replaced by their plain references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orthrus_kernels.products.plain
from orthrus_kernels.packing.quant_tensor import QuantTensor
from torch import Tensor

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.model import CudaModel


@contextmanager
def remembered_weights() -> Iterator[None]:
    """Stand-ins dequantize a matrix at its first use only, which makes them ten times faster."""
    dequantize = orthrus_kernels.products.plain.dequantize
    known: dict[int, tuple[QuantTensor, Tensor]] = {}

    def remembered(weight: QuantTensor) -> Tensor:
        if id(weight) not in known:  # the tensor is kept, so that its id stays its own
            known[id(weight)] = weight, dequantize(weight).double()
        return known[id(weight)][1]

    orthrus_kernels.products.plain.dequantize = remembered
    try:
        yield
    finally:
        orthrus_kernels.products.plain.dequantize = dequantize


@contextmanager
def stand_in(path: Path, **settings: Any) -> Iterator[CudaModel]:
    """The model of a file on the stand-ins."""
    with (
        remembered_weights(),
        ModelFile.open(path) as file,
        CudaModel.load(file, **{"device": "cpu", **settings}) as model,
    ):
        yield model


DemoFile = Callable[..., Path]
