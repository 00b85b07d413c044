"""Every kernel's function in plain torch, under the names and signatures of the real ones."""

from orthrus_kernels.attention.plain import attention
from orthrus_kernels.elementwise.plain import (
    embed,
    finish_qkv,
    plan_rows,
    quantize_rows,
    residual_norm,
    silu_multiply,
)
from orthrus_kernels.products.plain import (
    dequantize,
    gate_up,
    head_argmax,
    matmul,
    natural_rows,
    prompt_matmul,
)
from orthrus_kernels.sampling.plain import accept, pick, sample, write_drafts

__all__ = [
    "accept",
    "attention",
    "dequantize",
    "embed",
    "finish_qkv",
    "gate_up",
    "head_argmax",
    "matmul",
    "natural_rows",
    "pick",
    "plan_rows",
    "prompt_matmul",
    "quantize_rows",
    "residual_norm",
    "sample",
    "silu_multiply",
    "write_drafts",
]
