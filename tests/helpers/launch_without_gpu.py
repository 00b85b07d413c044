"""Run the products' launch code with a driver that compiles for sm_86 and launches nothing.

The interpreter binds arguments in its own way, and the offline compiler takes signatures from the
cases: only this shows that what matmul.py passes is what the real launcher takes. Prints the names
of the kernels that compiled. Run as a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from gguf import GGMLQuantizationType as T
from orthrus_kernels.elementwise.activation_rows import new_int8_rows
from orthrus_kernels.elementwise.activations import interleave
from orthrus_kernels.packing.pack import pack
from orthrus_kernels.packing.quant_tensor import Layout
from orthrus_kernels.products.dequantize import dequantize
from orthrus_kernels.products.dispatch import Tile
from orthrus_kernels.products.matmul import gate_up, head_argmax, matmul
from quant_rows import random_rows
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TILE = Tile(16, 64, 4, 3)


class CompileOnly:
    """The parts of a triton driver that a launch asks for before it launches."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 86, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def main() -> None:
    triton.runtime.driver.set_active(CompileOnly())
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        print(self.__name__)
        return kernel

    JITFunction.run = compile_only
    x = interleave(torch.zeros(5, 512).half())
    a16 = pack(random_rows(T.Q4_K, 128, 512), T.Q4_K, 512)
    second = pack(random_rows(T.Q6_K, 64, 512), T.Q6_K, 512)
    matmul(x, a16, TILE, 2, second=second)
    gate_up(x, a16, TILE)
    head_argmax(x, second, TILE)
    dequantize(a16)
    rows = new_int8_rows(5, 288, "cpu")
    a8 = pack(random_rows(T.Q5_0, 128, 288), T.Q5_0, 288, Layout.A8)
    matmul(rows, a8, TILE, 2)
    gate_up(rows, a8, TILE, out=new_int8_rows(5, 64, "cpu"))
    head_argmax(rows, a8, TILE)
    dequantize(a8)


if __name__ == "__main__":
    main()
