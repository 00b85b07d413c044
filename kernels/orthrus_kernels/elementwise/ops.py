"""Small fused kernels between the products: ordered split-K sums, norms, gating.

A product leaves `splits` f32 partial sums; the next kernel here adds them in order, so nothing is
atomic and a row's bits depend on nothing but the row: one program per row (or per row and head).

Partials are [splits, rows, columns], contiguous but for columns to spare: f32, or f16 with a single
split (from the prompt path). Outputs are rows in the form that the next product reads, f16 or int8
(`activation_rows.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from orthrus_kernels.elementwise.activation_rows import (
    Int8Rows,
    row_pointers,
    row_strides,
    store_columns,
)
from orthrus_kernels.overlap import begin, overlapped


def residual_norm(
    partials: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | Int8Rows,
    index: Tensor | None = None,
) -> None:
    """residual += sum of partials, in place; out = RMSNorm(residual) * weight.

    residual: f32 [rows, n]. weight: f32 [n]. out: f16 or int8 rows of n columns.
    index: i32, rows to take: out then holds those, in that order, and the residual stays as it is.
    """
    n = residual.shape[1]
    given = residual[None] if partials is None else partials
    _residual_norm[(residual.shape[0] if index is None else index.shape[0],)](
        given,
        residual,
        weight,
        given if index is None else index,
        *row_pointers(out),
        *part_sizes(given),
        *row_strides(out),
        eps,
        SPLITS=0 if partials is None else partials.shape[0],
        N=n,
        WIDTH=triton.next_power_of_2(n),
        INT8=isinstance(out, Int8Rows),
        INDEXED=index is not None,
        num_warps=8,
        enable_fp_fusion=False,
        **overlapped(),
    )


def silu_multiply(gate: Tensor, up: Tensor, out: Tensor | Int8Rows, *, paired: int = 0) -> None:
    """out = silu(sum of gate) * sum of up, for partials [splits, rows, n] of equal strides.

    paired: gate and up are one [splits, rows, 2 n], so many columns of either in turn.
    """
    splits, rows, n = gate.shape
    if up.stride() != gate.stride():
        raise ValueError(f"strides of gate {gate.stride()} and up {up.stride()} differ")
    if paired:
        n, up = n // 2, up[..., paired:]
    _silu_multiply[(rows, triton.cdiv(n, 1024))](
        gate,
        up,
        *row_pointers(out),
        *part_sizes(gate),
        *row_strides(out),
        n,
        SPLITS=splits,
        PAIRED=paired,
        TILE=1024,
        INT8=isinstance(out, Int8Rows),
        num_warps=4,
        enable_fp_fusion=False,
    )


def quantize_rows(x: Tensor, out: Tensor | Int8Rows) -> None:
    """f16 or f32 rows [rows, n] → f16 or int8 rows of n columns, where no kernel before could do it
    in passing."""
    rows, n = x.shape
    _quantize_rows[(rows, triton.cdiv(n, 1024))](
        x,
        *row_pointers(out),
        x.stride(0),
        *row_strides(out),
        n,
        TILE=1024,
        INT8=isinstance(out, Int8Rows),
        num_warps=4,
        enable_fp_fusion=False,
    )


def part_sizes(partials: Tensor) -> tuple[int, int]:
    """Rows per split, and elements per row.

    The kernels get the number of rows rather than the stride between splits, and are not
    specialized on it: its divisibility would decide how columns are spread over threads, and with
    that the order of sums over a row.
    """
    split, row, column = partials.stride()
    if column != 1 or split % row:
        raise ValueError(f"partials need whole rows between splits, found strides {split, row}")
    return split // row, row


@triton.jit
def split_sum(partials, row, part_rows, part_stride, columns, mask, SPLITS: tl.constexpr):
    """The partial sums of some columns of one row, added in ascending order."""
    at = partials + row.to(tl.int64) * part_stride + columns
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, SPLITS):
        at += part_rows.to(tl.int64) * part_stride
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["part_rows"])
def _residual_norm(
    partials,
    residual,
    weight,
    index,
    out,
    scales,
    sums,
    part_rows,
    part_stride,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    eps,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    INT8: tl.constexpr,
    INDEXED: tl.constexpr,
):
    begin()
    row = tl.program_id(0)
    source = row
    if INDEXED:
        source = tl.load(index + row)
    c = tl.arange(0, WIDTH)
    inside = c < N
    at = residual + source.to(tl.int64) * N + c
    x = tl.load(at, mask=inside, other=0.0)
    if SPLITS > 0:
        x += split_sum(partials, source, part_rows, part_stride, c, inside, SPLITS)
        if not INDEXED:  # one row may be taken more than once
            tl.store(at, x, mask=inside)
    mean = tl.sum(x * x, 0) / N
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    y = x * inverse * tl.load(weight + c, mask=inside, other=0.0)
    store_columns(
        y,
        out,
        scales,
        sums,
        row,
        0,
        N,
        row_stride,
        group_stride,
        scale_row_stride,
        scale_group_stride,
        WIDTH,
        INT8,
    )


@triton.jit(do_not_specialize=["part_rows"])
def _silu_multiply(
    gate,
    up,
    out,
    scales,
    sums,
    part_rows,
    part_stride,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    n,
    SPLITS: tl.constexpr,
    PAIRED: tl.constexpr,
    TILE: tl.constexpr,
    INT8: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.program_id(1) * TILE
    c = first + tl.arange(0, TILE)
    inside = c < n
    at = c if PAIRED == 0 else c // PAIRED * (2 * PAIRED) + c % PAIRED
    g = split_sum(gate, row, part_rows, part_stride, at, inside, SPLITS)
    u = split_sum(up, row, part_rows, part_stride, at, inside, SPLITS)
    y = tl.div_rn(g, 1.0 + tl.exp(-g)) * u
    store_columns(
        y,
        out,
        scales,
        sums,
        row,
        first,
        n,
        row_stride,
        group_stride,
        scale_row_stride,
        scale_group_stride,
        TILE,
        INT8,
    )


@triton.jit
def _quantize_rows(
    x,
    out,
    scales,
    sums,
    x_stride,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    n,
    TILE: tl.constexpr,
    INT8: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.program_id(1) * TILE
    c = first + tl.arange(0, TILE)
    y = tl.load(x + row.to(tl.int64) * x_stride + c, mask=c < n, other=0.0).to(tl.float32)
    store_columns(
        y,
        out,
        scales,
        sums,
        row,
        first,
        n,
        row_stride,
        group_stride,
        scale_row_stride,
        scale_group_stride,
        TILE,
        INT8,
    )
