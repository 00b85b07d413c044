"""Every kernel's function in plain torch, under the names and signatures of the real ones."""

from orthrus_kernels.attention.plain import attention, finish_qkv, move_columns
from orthrus_kernels.elementwise.plain import (
    embed,
    quantize_rows,
    residual_norm,
    rotary_angles,
    silu_multiply,
)
from orthrus_kernels.products.plain import (
    dequantize,
    gate_up,
    head_top2,
    matmul,
    natural_rows,
    prompt_matmul,
)
from orthrus_kernels.recurrence.plain import convolve, gated_norm, recur
from orthrus_kernels.sampling.plain import draw, pick

__all__ = [
    "attention",
    "convolve",
    "dequantize",
    "draw",
    "embed",
    "finish_qkv",
    "gate_up",
    "gated_norm",
    "head_top2",
    "matmul",
    "move_columns",
    "natural_rows",
    "pick",
    "prompt_matmul",
    "quantize_rows",
    "recur",
    "residual_norm",
    "rotary_angles",
    "silu_multiply",
]
