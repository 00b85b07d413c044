"""Small fused kernels between the products: ordered split-K sums, norms, RoPE, cache writes.

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

from orthrus_kernels.attention.kv_cache import FORMATS, KvPlanes, store_head
from orthrus_kernels.elementwise.activation_rows import (
    Int8Rows,
    row_pointers,
    row_strides,
    store_columns,
)
from orthrus_kernels.elementwise.rows import Rows


def residual_norm(
    partials: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor | Int8Rows
) -> None:
    """residual += sum of partials, in place; out = RMSNorm(residual) * weight.

    residual: f32 [rows, n]. weight: f32 [n]. out: f16 or int8 rows of n columns.
    """
    rows, n = residual.shape
    given = residual[None] if partials is None else partials
    _residual_norm[(rows,)](
        given,
        residual,
        weight,
        *row_pointers(out),
        *_part_sizes(given),
        *row_strides(out),
        eps,
        SPLITS=0 if partials is None else partials.shape[0],
        N=n,
        WIDTH=triton.next_power_of_2(n),
        INT8=isinstance(out, Int8Rows),
        num_warps=8,
        enable_fp_fusion=False,
    )


def silu_multiply(gate: Tensor, up: Tensor, out: Tensor | Int8Rows) -> None:
    """out = silu(sum of gate) * sum of up, for partials [splits, rows, n] of equal strides."""
    splits, rows, n = gate.shape
    if up.stride() != gate.stride():
        raise ValueError(f"strides of gate {gate.stride()} and up {up.stride()} differ")
    _silu_multiply[(rows, triton.cdiv(n, 1024))](
        gate,
        up,
        *row_pointers(out),
        *_part_sizes(gate),
        *row_strides(out),
        n,
        SPLITS=splits,
        TILE=1024,
        INT8=isinstance(out, Int8Rows),
        num_warps=4,
        enable_fp_fusion=False,
    )


def quantize_rows(x: Tensor, out: Int8Rows) -> None:
    """f16 or f32 rows [rows, n] → int8 rows, where no kernel before could do it in passing."""
    rows, n = x.shape
    _quantize_rows[(rows, triton.cdiv(n, 1024))](
        x,
        *row_pointers(out),
        x.stride(0),
        *row_strides(out),
        n,
        TILE=1024,
        num_warps=4,
        enable_fp_fusion=False,
    )


def finish_qkv(
    partials: Tensor,
    norms: Tensor,
    eps: float,
    rows: Rows,
    q: Tensor,
    keys: KvPlanes,
    values: KvPlanes,
    block_keys: KvPlanes,
    block_values: KvPlanes,
) -> None:
    """Sum the q, k and v products; norm and rotate q and k; write all three where they belong.

    partials: f32 [splits, rows, (n_head + 2 n_head_kv) * head_dim], q heads, then k, then v.
    norms: f32 [2 views, 2 (q, k), head_dim].
    q: f16 [rows, n_head, head_dim]. AR keys and values go to the cache at the row's position,
    those of diffusion rows to the pass's scratch (f16 planes by row); unused rows write only q.
    """
    count, n_head, head_dim = q.shape
    _finish_qkv[(count, n_head + 2 * keys.heads)](
        partials,
        norms,
        rows.views,
        rows.positions,
        rows.cos,
        rows.sin,
        q,
        keys.values,
        keys.scales,
        values.values,
        values.scales,
        block_keys.values,
        block_values.values,
        *_part_sizes(partials),
        keys.capacity,
        block_keys.capacity,
        eps,
        SPLITS=partials.shape[0],
        N_HEAD=n_head,
        HEADS=keys.heads,
        D=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        K_FORMAT=FORMATS[keys.type_name],
        V_FORMAT=FORMATS[values.type_name],
        num_warps=1,
        enable_fp_fusion=False,
    )


def _part_sizes(partials: Tensor) -> tuple[int, int]:
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
def _split_sum(partials, row, part_rows, part_stride, columns, mask, SPLITS: tl.constexpr):
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
):
    row = tl.program_id(0)
    c = tl.arange(0, WIDTH)
    inside = c < N
    at = residual + row.to(tl.int64) * N + c
    x = tl.load(at, mask=inside, other=0.0)
    if SPLITS > 0:
        x += _split_sum(partials, row, part_rows, part_stride, c, inside, SPLITS)
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
    TILE: tl.constexpr,
    INT8: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.program_id(1) * TILE
    c = first + tl.arange(0, TILE)
    inside = c < n
    g = _split_sum(gate, row, part_rows, part_stride, c, inside, SPLITS)
    u = _split_sum(up, row, part_rows, part_stride, c, inside, SPLITS)
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
        True,
    )


@triton.jit(do_not_specialize=["part_rows", "capacity", "block_capacity"])
def _finish_qkv(
    partials,
    norms,
    views,
    positions,
    cos,
    sin,
    q,
    k_values,
    k_scales,
    v_values,
    v_scales,
    block_k,
    block_v,
    part_rows,
    part_stride,
    capacity,
    block_capacity,
    eps,
    SPLITS: tl.constexpr,
    N_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
):
    """Program (row, head), heads counted over q, k and v."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    view = tl.load(views + row)
    c = tl.arange(0, WIDTH)
    inside = c < D
    x = _split_sum(partials, row, part_rows, part_stride, head * D + c, inside, SPLITS)
    kv_head = ((head + HEADS - N_HEAD % HEADS) % HEADS).to(tl.int64)
    at_cache = kv_head * capacity + tl.load(positions + row)
    at_block = kv_head * block_capacity + row
    if head < N_HEAD + HEADS:
        # Norm and rotation. Element c turns with its partner half a head away (NeoX pairing).
        partner = tl.where(c < D // 2, c + D // 2, c - D // 2)
        y = _split_sum(partials, row, part_rows, part_stride, head * D + partner, inside, SPLITS)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / D + eps))
        at_norm = norms + (tl.maximum(view, 0) * 2 + (head >= N_HEAD).to(tl.int32)) * D
        x = x * inverse * tl.load(at_norm + c, mask=inside, other=0.0)
        y = y * inverse * tl.load(at_norm + partner, mask=inside, other=0.0)
        pair = row * (D // 2) + tl.where(c < D // 2, c, c - D // 2)
        turned = y * tl.load(sin + pair, mask=inside, other=0.0)
        x = x * tl.load(cos + pair, mask=inside, other=0.0)
        x = x + tl.where(c < D // 2, -turned, turned)
        if head < N_HEAD:
            at_q = q + (row * N_HEAD + head).to(tl.int64) * D + c
            tl.store(at_q, x.to(tl.float16), mask=inside)
        elif view == 0:
            store_head(x, k_values, k_scales, at_cache, D, WIDTH, K_FORMAT)
        elif view == 1:
            store_head(x, block_k, block_k, at_block, D, WIDTH, 0)
    elif view == 0:
        store_head(x, v_values, v_scales, at_cache, D, WIDTH, V_FORMAT)
    elif view == 1:
        store_head(x, block_v, block_v, at_block, D, WIDTH, 0)
