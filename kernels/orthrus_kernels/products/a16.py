"""Matrix products with fp16 activations and fp32 sums: out[m, n] = sum over k of x[m, k] W[n, k].

The weights are the left operand of the MMA, the rows of x the right one. Sums run over k in the
same order, with the same split and the same MMA for every number of rows: a row's result does not
depend on the rows beside it. Warps never split K (tests assert warpsPerCTA = [warps, 1]).

x is f16 [rows, x_stride], interleaved and padded with zeros to whole steps of 256 (activations.py).
KIND = (main bits, high bits, scale form, bias, scale bias, has min), see `kind_of`; 16 main bits
mean a plane of F16 or BF16.
"""

import triton
import triton.language as tl

from orthrus_kernels.overlap import begin
from orthrus_kernels.products.outputs import store_gated, store_partial, store_top2
from orthrus_kernels.products.weights import weights_half


@triton.jit
def sum_quantized(
    x_at,
    mask_m,
    main,
    high,
    scales,
    supers,
    tile,
    first_step,
    last_step,
    steps,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """fp32 [BN, BM]: x times the rows tile * BN ... of a quantized matrix, over some steps."""
    MAIN: tl.constexpr = KIND[0]
    HIGH: tl.constexpr = KIND[1]
    OUTER: tl.constexpr = 4 if HIGH == 1 else (2 if HIGH == 2 or MAIN == 2 else 1)
    WIDTH: tl.constexpr = 64 // OUTER  # elements, and k, of one dot
    PER_ROW: tl.constexpr = 32 if MAIN == 2 else 64  # main elements per row (and j, for 8 bits)
    HALVES: tl.constexpr = 2 if MAIN == 8 else 1
    n = tile * BN + tl.arange(0, BN)
    first_row = (n // 64).to(tl.int64) * steps * 64
    inside = n % 64
    elements = tl.arange(0, WIDTH)
    row = first_row + inside
    main_at = main + (first_row * HALVES + inside)[:, None] * PER_ROW + elements[None, :]
    high_at = high + row[:, None] * (16 * HIGH) + elements[None, :]
    words_at = scales + (row * 4)[:, None] + tl.arange(0, 4)[None, :]
    supers_at = supers + row
    x_at = x_at[None, :] + elements[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(first_step, last_step):
        words = tl.load(words_at + step * 256)
        super_word = words if KIND[2] == 0 else tl.load(supers_at + step * 64)[:, None]
        main_step = step * (64 * HALVES * PER_ROW)
        for o in tl.static_range(OUTER):
            if MAIN == 2 and HIGH == 0:
                main_tile = tl.load(main_at + main_step)
            elif MAIN == 2:
                main_tile = tl.load(main_at + (main_step + (o % 2) * WIDTH))
            else:
                main_tile = tl.load(main_at + (main_step + o * WIDTH))
            high_tile = tl.load(high_at + step * (1024 * HIGH)) if HIGH > 0 else main_tile
            for h in tl.static_range(4):
                if MAIN == 8 and h == 2:
                    main_tile = tl.load(main_at + (main_step + 64 * PER_ROW))
                xs = tl.load(
                    x_at + (step * 256 + h * 64 + o * WIDTH), mask=mask_m[None, :], other=0.0
                )
                w = weights_half(
                    main_tile, high_tile, words, super_word, h, o, OUTER, KIND, ASM, BN
                )
                acc = tl.dot(w, xs, acc)
    return acc


@triton.jit
def sum_plain(
    x_at,
    mask_m,
    main,
    tile,
    first_step,
    last_step,
    steps,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """fp32 [BN, BM]: the same for an F16 or BF16 plane [P, 4 * steps, 64, 64]; two dots of 64."""
    n = tile * BN + tl.arange(0, BN)
    kk = tl.arange(0, 64)
    first_row = (n // 64).to(tl.int64) * (steps * 4) * 64 + n % 64
    main_at = main + first_row[:, None] * 64 + kk[None, :]
    x_at = x_at[None, :] + kk[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for pair in range(first_step * 2, last_step * 2):
        for half in tl.static_range(2):
            w = tl.load(main_at + (pair * 2 + half) * 4096)
            xs = tl.load(x_at + (pair * 2 + half) * 64, mask=mask_m[None, :], other=0.0)
            acc = tl.dot(w.to(tl.float32).to(tl.float16), xs, acc)
    return acc


@triton.jit
def sum_matrix(
    x,
    rows_m,
    mask_m,
    main,
    high,
    scales,
    supers,
    tile,
    steps,
    x_stride,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """fp32 [BN, BM]: one tile of one matrix, over this program's share of the steps."""
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, steps)
    x_at = x + rows_m.to(tl.int64) * x_stride
    if KIND[0] == 16:
        acc = sum_plain(x_at, mask_m, main, tile, first, last, steps, BM, BN)
    else:
        acc = sum_quantized(
            x_at, mask_m, main, high, scales, supers, tile, first, last, steps, KIND, ASM, BM, BN
        )
    return acc


@triton.jit(do_not_specialize=["rows", "steps"])
def matmul_a16(
    x,
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
    x_stride,
    split_stride,
    A: tl.constexpr,
    B: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out f32 [SPLIT, rows, a_n + b_n] = x times the rows of matrix A, then of matrix B.

    Grid (tiles of A + tiles of B, SPLIT, row tiles). `B` None: one matrix. The parts of a split
    lie `split_stride` numbers apart and are summed, in order, by the kernel that comes next.
    """
    begin()
    tile = tl.program_id(0)
    rows_m = tl.program_id(2) * BM + tl.arange(0, BM)
    mask_m = rows_m < rows
    first = tile * BN
    stop = a_n
    if B is None:
        acc = sum_matrix(
            x, rows_m, mask_m, a_main, a_high, a_scales, a_supers, tile, steps, x_stride,
            A, ASM, BM, BN, SPLIT,
        )  # fmt: skip
    else:
        a_tiles = tl.cdiv(a_n, BN)
        if tile < a_tiles:
            acc = sum_matrix(
                x, rows_m, mask_m, a_main, a_high, a_scales, a_supers, tile, steps, x_stride,
                A, ASM, BM, BN, SPLIT,
            )  # fmt: skip
        else:
            first = a_n + (tile - a_tiles) * BN
            stop = a_n + b_n
            acc = sum_matrix(
                x, rows_m, mask_m, b_main, b_high, b_scales, b_supers, tile - a_tiles, steps,
                x_stride, B, ASM, BM, BN, SPLIT,
            )  # fmt: skip
    store_partial(out, acc, first, stop, rows_m, mask_m, a_n + b_n, split_stride, BN)


@triton.jit(do_not_specialize=["rows", "steps"])
def gate_up_a16(
    x,
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
    x_stride,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    KIND: tl.constexpr,
    INT8: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out [rows, n_rows / 2] = silu(gate) * up; the matrix alternates 8 gate rows and 8 up rows."""
    begin()
    tile = tl.program_id(0)
    rows_m = tl.program_id(2) * BM + tl.arange(0, BM)
    mask_m = rows_m < rows
    acc = sum_matrix(
        x, rows_m, mask_m, main, high, scales, supers, tile, steps, x_stride,
        KIND, ASM, BM, BN, 1,
    )  # fmt: skip
    store_gated(
        acc, out, out_scales, out_sums, tile, rows_m, mask_m, n_rows // 2, row_stride,
        group_stride, scale_row_stride, scale_group_stride, INT8, BM, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "steps"])
def head_a16(
    x,
    main,
    high,
    scales,
    supers,
    values,
    tokens,
    rows,
    n_rows,
    steps,
    x_stride,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The two largest logits of each tile of the vocabulary, and its sum: `store_top2`."""
    begin()
    tile = tl.program_id(0)
    rows_m = tl.program_id(2) * BM + tl.arange(0, BM)
    mask_m = rows_m < rows
    acc = sum_matrix(
        x, rows_m, mask_m, main, high, scales, supers, tile, steps, x_stride,
        KIND, ASM, BM, BN, 1,
    )  # fmt: skip
    store_top2(values, tokens, acc, tile, rows, rows_m, mask_m, n_rows, BN)
