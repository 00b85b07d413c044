"""What the products do with their sums [BN, BM]: partials, silu(gate) * up, best two of a tile."""

import triton
import triton.language as tl

from orthrus_kernels.elementwise.activations import interleaved


@triton.jit
def store_partial(
    out,
    acc,
    first,
    stop,
    rows_m,
    mask_m,
    columns,
    split_stride,
    BN: tl.constexpr,
):
    """Columns first ... first + BN - 1, below stop, of this split's part [rows, columns]."""
    n = first + tl.arange(0, BN)
    at = tl.program_id(1).to(tl.int64) * split_stride + rows_m.to(tl.int64) * columns
    tl.store(out + at[None, :] + n[:, None], acc, mask=mask_m[None, :] & (n < stop)[:, None])


@triton.jit
def store_gated(
    acc,
    out,
    out_scales,
    out_sums,
    tile,
    rows_m,
    mask_m,
    columns,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    INT8: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """silu(gate) * up as interleaved fp16 (held within its range) or as int8 in groups of 32.

    acc alternates 8 gate rows and 8 up rows, which one thread of an MMA holds both.
    """
    pairs = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    value = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (BN // 2, BM))
    m = rows_m.to(tl.int64)
    if INT8:
        G: tl.constexpr = BN // 64
        groups = tl.reshape(value, (G, 32, BM))
        d = tl.div_rn(tl.max(tl.abs(groups), 1), tl.full((G, BM), 127.0, tl.float32))
        safe = tl.where(d == 0.0, 1.0, d)
        size = tl.div_rn(tl.abs(groups), tl.broadcast_to(safe[:, None, :], (G, 32, BM)))
        size = tl.floor(size + 0.5).to(tl.int32)
        quants = tl.where(groups < 0.0, -size, size)
        g = tile * G + tl.arange(0, G)
        mask = mask_m[None, :] & (g * 32 < columns)[:, None]
        at = m[None, :] * row_stride + g.to(tl.int64)[:, None] * group_stride
        at = at[:, None, :] + tl.arange(0, 32)[None, :, None]
        tl.store(out + at, quants.to(tl.int8), mask=tl.broadcast_to(mask[:, None, :], (G, 32, BM)))
        at = m[None, :] * scale_row_stride + g.to(tl.int64)[:, None] * scale_group_stride
        tl.store(out_scales + at, d, mask=mask)
        tl.store(out_sums + at, d * tl.sum(quants, 1).to(tl.float32), mask=mask)
    else:
        half = tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16)
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
        at = out + m[None, :] * row_stride + interleaved(n)[:, None]
        tl.store(at, half, mask=mask_m[None, :] & (n < columns)[:, None])


@triton.jit
def store_top2(values, tokens, acc, tile, rows, rows_m, mask_m, n_rows, BN: tl.constexpr):
    """Per row of x, of the tile's values: the largest, the second and the sum of exp(value -
    largest), planes of `values` [3, tiles, rows]; where the two are, planes of `tokens`. The lowest
    index on ties; NaN counts as infinite.
    """
    n = tile * BN + tl.arange(0, BN)
    inside = tl.where(acc != acc, float("inf"), acc)
    inside = tl.where((n < n_rows)[:, None], inside, float("-inf"))
    best, best_at = tl.max(inside, 0, return_indices=True, return_indices_tie_break_left=True)
    mass = tl.sum(tl.exp(inside - best[None, :]), 0)
    rest = tl.where(tl.arange(0, BN)[:, None] == best_at[None, :], float("-inf"), inside)
    second, second_at = tl.max(rest, 0, return_indices=True, return_indices_tie_break_left=True)
    plane = tl.num_programs(0).to(tl.int64) * rows
    at = tile.to(tl.int64) * rows + rows_m
    tl.store(values + at, best, mask=mask_m)
    tl.store(values + plane + at, second, mask=mask_m)
    tl.store(values + 2 * plane + at, mass, mask=mask_m)
    tl.store(tokens + at, tile * BN + best_at, mask=mask_m)
    tl.store(tokens + plane + at, tile * BN + second_at, mask=mask_m)
