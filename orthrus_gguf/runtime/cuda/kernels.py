"""The kernels that the runtime launches: Triton's, or their plain torch references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orthrus_kernels import plain as reference
from orthrus_kernels.attention import attention
from orthrus_kernels.elementwise import embedding, ops, rows
from orthrus_kernels.products import dequantize as matmul_dequantize
from orthrus_kernels.products import matmul
from orthrus_kernels.sampling import accept, sample

Launch = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """One function per kernel; signatures are those of the modules of `orthrus_kernels`."""

    name: str
    embed: Launch
    plan_rows: Launch
    residual_norm: Launch
    matmul: Launch
    gate_up: Launch
    silu_multiply: Launch
    finish_qkv: Launch
    attention: Launch
    head_argmax: Launch
    prompt_matmul: Launch
    sample: Launch
    pick: Launch
    accept: Launch
    write_drafts: Launch


TRITON = Kernels(
    name="triton",
    embed=embedding.embed,
    plan_rows=rows.plan_rows,
    residual_norm=ops.residual_norm,
    matmul=matmul.matmul,
    gate_up=matmul.gate_up,
    silu_multiply=ops.silu_multiply,
    finish_qkv=ops.finish_qkv,
    attention=attention.attention,
    head_argmax=matmul.head_argmax,
    prompt_matmul=matmul_dequantize.prompt_matmul,
    sample=sample.sample,
    pick=sample.pick,
    accept=accept.accept,
    write_drafts=accept.write_drafts,
)
"""For a GPU; in a process with TRITON_INTERPRET=1 also for tensors on the CPU."""

STAND_INS = Kernels(
    name="stand-ins",
    embed=reference.embed,
    plan_rows=reference.plan_rows,
    residual_norm=reference.residual_norm,
    matmul=reference.matmul,
    gate_up=reference.gate_up,
    silu_multiply=reference.silu_multiply,
    finish_qkv=reference.finish_qkv,
    attention=reference.attention,
    head_argmax=reference.head_argmax,
    prompt_matmul=reference.prompt_matmul,
    sample=reference.sample,
    pick=reference.pick,
    accept=reference.accept,
    write_drafts=reference.write_drafts,
)
"""For the CPU: slow, and the oracle."""
