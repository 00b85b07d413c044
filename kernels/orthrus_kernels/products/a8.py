"""Matrix products with int8 activations: exact integer dots of 32, scaled and summed in fp32.

For cards where fp16 MMAs with fp32 sums are the limit at 24 rows (sm_86: int8 runs at four times
their rate). Groups are summed in the order of k with explicit operations per element, so that a
row's bits do not depend on the rows beside it; there is no float MMA in it.

Activations: int8 [rows, groups, 32] in natural order with any strides, f32 scales and, for types
with a minimum, sums (scale * sum of the group) [rows, groups]. A dot starts from the integer whose
bits are the float 1.5 * 2^23, so that its result read as a float is that number plus the dot: no
integer to float conversion (|dot| <= 32 * 127 * 128 < 2^22).
"""

import triton
import triton.language as tl

from orthrus_kernels.overlap import begin
from orthrus_kernels.products.outputs import store_gated, store_partial, store_top2
from orthrus_kernels.products.weights import half_bits, small_half
from orthrus_kernels.products.weights_a8 import (
    group_scales,
    product_codes,
    repeated_mins,
    signed_codes,
)

MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def exact_dot(codes, xs, shape):
    """f32 codes . xs, exact."""
    start = tl.full(shape, MAGIC_BITS, tl.int32)
    total = tl.dot(codes, xs, start, out_dtype=tl.int32)
    return total.to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def add_dot(acc, codes, xs, scale, dx):
    """acc + (codes . xs) * scale[n] * dx[m], the dot exact."""
    return tl.fma(exact_dot(codes, xs, acc.shape) * scale[:, None], dx[None, :], acc)


@triton.jit
def add_products(
    acc, main, high, halves, xs, d, low, dx,
    R: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc + a group of a type whose scales go into the integers; low: -dmin[n]."""
    codes = product_codes(main, high, halves, R, J, KIND, ASM, BN)
    if KIND[5]:
        mins = exact_dot(repeated_mins(halves, R, J, ASM, BN), xs, acc.shape) * low[:, None]
        scale = tl.broadcast_to(d[:, None], acc.shape)
        both = tl.fma(exact_dot(codes, xs, acc.shape), scale, mins)
        acc = tl.fma(both, tl.broadcast_to(dx[None, :], acc.shape), acc)
    else:
        acc = add_dot(acc, codes, xs, -d, dx)
    return acc


@triton.jit
def sum_int8(
    x,
    x_scales,
    x_sums,
    rows_m,
    mask_m,
    main,
    high,
    scales,
    supers,
    tile,
    steps,
    groups,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    KIND: tl.constexpr,
    K_TAIL: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 [BN, BM]: one tile of one matrix, over this program's share of the steps."""
    MAIN: tl.constexpr = KIND[0]
    HIGH: tl.constexpr = KIND[1]
    PER_ROW: tl.constexpr = 64 if MAIN == 2 else 128
    HALVES: tl.constexpr = 2 if MAIN == 8 else 1
    share = tl.cdiv(steps, SPLIT)
    first_step = tl.program_id(1) * share
    last_step = tl.minimum(first_step + share, steps)
    n = tile * BN + tl.arange(0, BN)
    first_row = (n // 64).to(tl.int64) * steps * 64
    inside = n % 64
    row = first_row + inside
    kk = tl.arange(0, 32)
    main_at = main + (first_row * HALVES + inside)[:, None] * PER_ROW + kk[None, :]
    high_at = high + row[:, None] * (32 * HIGH) + kk[None, :]
    words_at = scales + first_row * 4 + inside
    supers_at = supers + row
    halves_at = scales + (first_row * 4 + inside * 2)[:, None] + tl.arange(0, 2)[None, :]
    m = rows_m.to(tl.int64)
    x_at = x + m[None, :] * row_stride + kk[:, None]
    x_scales_at = x_scales + m * scale_row_stride
    x_sums_at = x_sums + m * scale_row_stride
    first_half = (kk < 16)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    # All loads of a loop with its own num_stages are copied ahead, not only those of the dots.
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        main_step = step * (64 * HALVES * PER_ROW)
        super_word = tl.zeros((BN,), tl.uint32) if KIND[2] == 0 else tl.load(supers_at + step * 64)
        d = half_bits(super_word & 0xFFFF).to(tl.float32)
        for r in tl.static_range(4):
            if MAIN == 2 and r % 2 == 0:
                halves = tl.load(halves_at + (step * 256 + r * 64))
            if MAIN != 2:
                word = tl.load(words_at + (step * 256 + r * 64))
            if MAIN == 2:
                main_tile = tl.load(main_at + (main_step + (r // 2) * 32))
            else:
                main_tile = tl.load(main_at + (main_step + r * 32))
            if HIGH == 0:
                high_tile = main_tile
            elif HIGH == 1:
                high_tile = tl.load(high_at + step * 2048)
            else:
                high_tile = tl.load(high_at + (step * 4096 + (r // 2) * 32))
            for j in tl.static_range(2):
                if MAIN == 8 and j == 1:
                    main_tile = tl.load(main_at + (main_step + 64 * PER_ROW + r * 32))
                group = step * 8 + (r * 2 + j)
                there = mask_m & (group < groups) if K_TAIL else mask_m
                at = group.to(tl.int64)
                dx = tl.load(x_scales_at + at * scale_group_stride, mask=there, other=0.0)
                if MAIN == 2:
                    xs = tl.load(x_at + at * group_stride, mask=there[None, :], other=0)
                    low = -half_bits(super_word >> 16).to(tl.float32)
                    acc = add_products(
                        acc, main_tile, high_tile, halves, xs, d, low, dx, r, j, KIND, ASM, BN
                    )
                elif KIND[2] == 2:
                    codes = signed_codes(main_tile, high_tile, r, j, KIND, ASM)
                    # A scale per 16: two dots, each with the other half of x left at zero.
                    first = there[None, :] & first_half
                    xs = tl.load(x_at + at * group_stride, mask=first, other=0)
                    acc = add_dot(acc, codes, xs, group_scales(word, d, j, 0, KIND), dx)
                    second = there[None, :] & ~first_half
                    xs = tl.load(x_at + at * group_stride, mask=second, other=0)
                    acc = add_dot(acc, codes, xs, group_scales(word, d, j, 1, KIND), dx)
                else:
                    codes = signed_codes(main_tile, high_tile, r, j, KIND, ASM)
                    xs = tl.load(x_at + at * group_stride, mask=there[None, :], other=0)
                    acc = add_dot(acc, codes, xs, group_scales(word, d, j, 0, KIND), dx)
                if KIND[5] and MAIN != 2:
                    sums = tl.load(x_sums_at + at * scale_group_stride, mask=there, other=0.0)
                    low_code = (word >> (16 * j + 8)) & 0xFF
                    dmin = half_bits(super_word >> 16).to(tl.float32)
                    low_min = (small_half(low_code) - 1024.0).to(tl.float32) * dmin
                    acc = tl.fma(-low_min[:, None], sums[None, :], acc)
    return acc


@triton.jit(do_not_specialize=["rows", "steps"])
def matmul_a8(
    x,
    x_scales,
    x_sums,
    a_main,
    a_high,
    a_scales,
    a_supers,
    b_main,
    b_high,
    b_scales,
    b_supers,
    out,
    rows,
    a_n,
    b_n,
    steps,
    groups,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    split_stride,
    A: tl.constexpr,
    B: tl.constexpr,
    K_TAIL: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out f32 [SPLIT, rows, a_n + b_n]: as `matmul_a16`, with int8 activations."""
    begin()
    tile = tl.program_id(0)
    rows_m = tl.program_id(2) * BM + tl.arange(0, BM)
    mask_m = rows_m < rows
    first = tile * BN
    stop = a_n
    if B is None:
        acc = sum_int8(
            x, x_scales, x_sums, rows_m, mask_m, a_main, a_high, a_scales, a_supers, tile, steps,
            groups, row_stride, group_stride, scale_row_stride, scale_group_stride,
            A, K_TAIL, ASM, BM, BN, SPLIT, STAGES,
        )  # fmt: skip
    else:
        a_tiles = tl.cdiv(a_n, BN)
        if tile < a_tiles:
            acc = sum_int8(
                x, x_scales, x_sums, rows_m, mask_m, a_main, a_high, a_scales, a_supers, tile,
                steps, groups, row_stride, group_stride, scale_row_stride, scale_group_stride,
                A, K_TAIL, ASM, BM, BN, SPLIT, STAGES,
            )  # fmt: skip
        else:
            first = a_n + (tile - a_tiles) * BN
            stop = a_n + b_n
            acc = sum_int8(
                x, x_scales, x_sums, rows_m, mask_m, b_main, b_high, b_scales, b_supers,
                tile - a_tiles, steps, groups, row_stride, group_stride, scale_row_stride,
                scale_group_stride, B, K_TAIL, ASM, BM, BN, SPLIT, STAGES,
            )  # fmt: skip
    store_partial(out, acc, first, stop, rows_m, mask_m, a_n + b_n, split_stride, BN)


@triton.jit(do_not_specialize=["rows", "steps"])
def gate_up_a8(
    x,
    x_scales,
    x_sums,
    main,
    high,
    scales,
    supers,
    out,
    out_scales,
    out_sums,
    rows,
    n_rows,
    steps,
    groups,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    out_row_stride,
    out_group_stride,
    out_scale_row_stride,
    out_scale_group_stride,
    KIND: tl.constexpr,
    INT8: tl.constexpr,
    K_TAIL: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [rows, n_rows / 2] = silu(gate) * up: as `gate_up_a16`, with int8 activations."""
    begin()
    tile = tl.program_id(0)
    rows_m = tl.program_id(2) * BM + tl.arange(0, BM)
    mask_m = rows_m < rows
    acc = sum_int8(
        x, x_scales, x_sums, rows_m, mask_m, main, high, scales, supers, tile, steps, groups,
        row_stride, group_stride, scale_row_stride, scale_group_stride,
        KIND, K_TAIL, ASM, BM, BN, 1, STAGES,
    )  # fmt: skip
    store_gated(
        acc, out, out_scales, out_sums, tile, rows_m, mask_m, n_rows // 2, out_row_stride,
        out_group_stride, out_scale_row_stride, out_scale_group_stride, INT8, BM, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "steps"])
def head_a8(
    x,
    x_scales,
    x_sums,
    main,
    high,
    scales,
    supers,
    values,
    tokens,
    rows,
    n_rows,
    steps,
    groups,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    KIND: tl.constexpr,
    K_TAIL: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The two largest logits of each tile, and its sum: as `head_a16`, with int8 activations."""
    begin()
    tile = tl.program_id(0)
    rows_m = tl.program_id(2) * BM + tl.arange(0, BM)
    mask_m = rows_m < rows
    acc = sum_int8(
        x, x_scales, x_sums, rows_m, mask_m, main, high, scales, supers, tile, steps, groups,
        row_stride, group_stride, scale_row_stride, scale_group_stride,
        KIND, K_TAIL, ASM, BM, BN, 1, STAGES,
    )  # fmt: skip
    store_top2(values, tokens, acc, tile, rows, rows_m, mask_m, n_rows, BN)
