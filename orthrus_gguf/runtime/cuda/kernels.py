"""The kernels that the runtime launches: Triton's, or their plain torch references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from orthrus_kernels import plain
from orthrus_kernels.attention.attention import attention
from orthrus_kernels.attention.finish_qkv import finish_qkv
from orthrus_kernels.attention.kv_cache import move_columns
from orthrus_kernels.elementwise.embedding import embed
from orthrus_kernels.elementwise.ops import quantize_rows, residual_norm, silu_multiply
from orthrus_kernels.elementwise.rows import rotary_angles
from orthrus_kernels.products.dequantize import prompt_matmul
from orthrus_kernels.products.matmul import gate_up, head_top2, matmul
from orthrus_kernels.recurrence.delta_net import convolve, gated_norm, recur
from orthrus_kernels.sampling.sample import draw, pick

Launch = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """One function per kernel; signatures are those of the modules of `orthrus_kernels`."""

    name: str
    embed: Launch
    rotary_angles: Launch
    move_columns: Launch
    residual_norm: Launch
    quantize_rows: Launch
    matmul: Launch
    gate_up: Launch
    silu_multiply: Launch
    finish_qkv: Launch
    attention: Launch
    head_top2: Launch
    prompt_matmul: Launch
    draw: Launch
    pick: Launch
    convolve: Launch
    recur: Launch
    gated_norm: Launch


TRITON = Kernels(
    name="triton",
    embed=embed,
    rotary_angles=rotary_angles,
    move_columns=move_columns,
    residual_norm=residual_norm,
    quantize_rows=quantize_rows,
    matmul=matmul,
    gate_up=gate_up,
    silu_multiply=silu_multiply,
    finish_qkv=finish_qkv,
    attention=attention,
    head_top2=head_top2,
    prompt_matmul=prompt_matmul,
    draw=draw,
    pick=pick,
    convolve=convolve,
    recur=recur,
    gated_norm=gated_norm,
)
"""For a GPU; in a process with TRITON_INTERPRET=1 also for tensors on the CPU."""

STAND_INS = Kernels(
    "stand-ins", *(getattr(plain, field.name) for field in fields(Kernels) if field.name != "name")
)
"""For the CPU: slow, and the oracle."""
