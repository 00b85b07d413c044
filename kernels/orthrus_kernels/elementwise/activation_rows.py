"""Rows of activations as kernels store them for the products that read them.

f16 rows are f16 [rows, columns padded to 256] in the interleaved order of `activations.py`, zero in
the padding and held within the range of f16; int8 rows have a scale per 32 columns and keep their
order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_kernels.elementwise.activations import interleaved, padded_columns

GROUP = 32
"""Columns of int8 rows that share a scale."""

ALIGNED_ROWS = 16
"""Room for int8 rows comes in multiples of this: triton compiles for what divides a stride."""


@dataclass(frozen=True)
class Int8Rows:
    """Activations in groups of 32: value = quants * scales.

    quants: int8 [rows, groups, 32]; scales: f32 [rows, groups], largest magnitude / 127;
    sums: f32 [rows, groups], scale * sum of the group's quants (for weights that have a minimum).
    The first two strides are free.
    """

    quants: Tensor
    scales: Tensor
    sums: Tensor


def new_int8_rows(rows: int, columns: int, device: torch.device | str) -> Int8Rows:
    """Uninitialised. `columns` must be a multiple of 32.

    Groups lie outermost, the scales of one group side by side: the products read a group of all
    rows at a time, and with rows outermost they spill (kernels/LOG.md).
    """
    shape = (columns // GROUP, -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS)
    quants = torch.empty(*shape, GROUP, dtype=torch.int8, device=device)
    scales, sums = (torch.empty(shape, device=device) for _ in range(2))
    return Int8Rows(*(part.transpose(0, 1)[:rows] for part in (quants, scales, sums)))


def new_f16_rows(rows: int, columns: int, device: torch.device | str) -> Tensor:
    """Zeros: the kernels write whole columns and leave the padding alone."""
    return torch.zeros(rows, padded_columns(columns), dtype=torch.float16, device=device)


def row_pointers(out: Tensor | Int8Rows, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Three pointers for a kernel, from row `first` on; for f16 rows the last two are not used."""
    if isinstance(out, Int8Rows):
        return out.quants[first:], out.scales[first:], out.sums[first:]
    return out[first:], out, out


def row_strides(out: Tensor | Int8Rows) -> tuple[int, int, int, int]:
    """Row and group strides of the values, then of scales and sums."""
    if isinstance(out, Int8Rows):
        if out.scales.stride() != out.sums.stride():
            raise ValueError("strides of scales and sums differ")
        quants, scales = out.quants.stride(), out.scales.stride()
        return quants[0], quants[1], scales[0], scales[1]
    return out.stride(0), 32, 0, 0


@triton.jit
def store_columns(
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
    WIDTH: tl.constexpr,
    INT8: tl.constexpr,
):
    """Store f32 [WIDTH] as columns first .. first + WIDTH - 1 of a row of n columns."""
    if INT8:
        groups = tl.reshape(y, (WIDTH // 32, 32))
        g = first // 32 + tl.arange(0, WIDTH // 32)
        there = g < n // 32
        d = tl.div_rn(tl.max(tl.abs(groups), 1), tl.full((WIDTH // 32,), 127.0, tl.float32))
        safe = tl.where(d == 0.0, 1.0, d)
        size = tl.div_rn(tl.abs(groups), tl.broadcast_to(safe[:, None], (WIDTH // 32, 32)))
        size = tl.floor(size + 0.5).to(tl.int32)
        quants = tl.where(groups < 0.0, -size, size)
        at = out + row.to(tl.int64) * row_stride + g.to(tl.int64)[:, None] * group_stride
        at = at + tl.arange(0, 32)[None, :]
        tl.store(at, quants.to(tl.int8), mask=there[:, None])
        at = row.to(tl.int64) * scale_row_stride + g.to(tl.int64) * scale_group_stride
        tl.store(scales + at, d, mask=there)
        tl.store(sums + at, d * tl.sum(quants, 1).to(tl.float32), mask=there)
    else:
        c = first + tl.arange(0, WIDTH)
        at = out + row.to(tl.int64) * row_stride + interleaved(c)
        held = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
        tl.store(at, held.to(tl.float16), mask=c < n)
