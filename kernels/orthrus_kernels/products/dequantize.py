"""The path for prompts: a matrix to fp16 once, then a dense product by the vendor's library.

More than 64 rows make the fused products compute-bound; from there on it is cheaper to write the
weights out as fp16 (once for all rows) and to let cuBLAS work. Prompts are the same for every
decoding strategy, so this path need not be bit-equal to the fused one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, STEP, Layout, QuantTensor
from orthrus_kernels.products.matmul import kind_of, plane_arguments
from orthrus_kernels.products.weights import half_bits, small_half, weights_half
from orthrus_kernels.products.weights_a8 import (
    group_scales,
    product_codes,
    repeated_mins,
    signed_codes,
)

_ROWS = 64
"""Rows of one program: a panel."""


def dequantize(weight: QuantTensor, out: Tensor | None = None) -> Tensor:
    """f16 [rows, padded k]: interleaved for A16 and plain weights, natural order for A8.

    Any order serves a product whose other factor has the same one, which activations do.
    """
    if out is None:
        out = torch.empty(weight.rows, weight.padded_k, dtype=torch.float16, device=weight.device)
    if out.shape != (weight.rows, weight.padded_k) or out.stride(1) != 1:
        raise ValueError(
            f"out is {list(out.shape)}, expected [{weight.rows}, {weight.padded_k}] with "
            "contiguous rows"
        )
    if weight.type in PLAIN_TYPES:
        panels = weight.planes["main"].permute(0, 2, 1, 3).reshape(weight.padded_rows, -1)
        return out.copy_(panels[: weight.rows])
    steps = weight.padded_k // STEP
    kernel = _dequantize_a16 if weight.layout is Layout.A16 else _dequantize_a8
    kernel[(weight.padded_rows // _ROWS, steps)](
        *plane_arguments(weight), out, weight.rows, steps, out.stride(0),
        KIND=kind_of(weight.type), BN=_ROWS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def prompt_matmul(x: Tensor, weight: QuantTensor, scratch: Tensor, out: Tensor) -> None:
    """x W^T for many rows → out, f32 [rows, weight.rows], of any row stride.

    x: f16 [rows, padded k], in `dequantize`'s order. scratch: f16 of at least weight.rows * padded
    k numbers. Products stay f32, since outputs of `down` may lie beyond fp16.
    """
    dense = scratch.flatten()[: weight.rows * weight.padded_k].view(weight.rows, -1)
    factor = dequantize(weight, dense).T
    if x.device.type == "cpu":  # the interpreter's: torch keeps f16 products wide on GPUs only
        out.copy_(x.float() @ factor.float())
    elif out.is_contiguous():
        torch.mm(x, factor, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(x, factor, out_dtype=torch.float32))


@triton.jit
def _dequantize_a16(
    main,
    high,
    scales,
    supers,
    out,
    n_rows,
    steps,
    row_stride,
    KIND: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (panel, step): 64 rows of 256 weights."""
    MAIN: tl.constexpr = KIND[0]
    HIGH: tl.constexpr = KIND[1]
    OUTER: tl.constexpr = 4 if HIGH == 1 else (2 if HIGH == 2 or MAIN == 2 else 1)
    WIDTH: tl.constexpr = 64 // OUTER
    PER_ROW: tl.constexpr = 32 if MAIN == 2 else 64
    step = tl.program_id(0).to(tl.int64) * steps + tl.program_id(1)
    inside = tl.arange(0, BN)
    row = step * 64 + inside
    elements = tl.arange(0, WIDTH)
    words = tl.load(scales + row[:, None] * 4 + tl.arange(0, 4)[None, :])
    super_word = words if KIND[2] == 0 else tl.load(supers + row)[:, None]
    n = tl.program_id(0) * BN + inside
    out_at = out + n.to(tl.int64)[:, None] * row_stride + tl.program_id(1) * 256
    out_at = out_at + elements[None, :]
    halves = 2 if MAIN == 8 else 1
    main_at = main + (step * (64 * halves) + inside)[:, None] * PER_ROW + elements[None, :]
    high_at = high + row[:, None] * (16 * HIGH) + elements[None, :]
    for o in tl.static_range(OUTER):
        piece = 0 if MAIN == 2 and HIGH == 0 else (o % 2 if MAIN == 2 else o)
        main_tile = tl.load(main_at + piece * WIDTH)
        high_tile = tl.load(high_at) if HIGH > 0 else main_tile
        for h in tl.static_range(4):
            if MAIN == 8 and h == 2:
                main_tile = tl.load(main_at + 64 * PER_ROW)
            w = weights_half(main_tile, high_tile, words, super_word, h, o, OUTER, KIND, False, BN)
            tl.store(out_at + (h * 64 + o * WIDTH), w, mask=(n < n_rows)[:, None])


@triton.jit
def _dequantize_a8(
    main,
    high,
    scales,
    supers,
    out,
    n_rows,
    steps,
    row_stride,
    KIND: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (panel, step), as above, from the A8 planes: natural order."""
    MAIN: tl.constexpr = KIND[0]
    HIGH: tl.constexpr = KIND[1]
    PER_ROW: tl.constexpr = 64 if MAIN == 2 else 128
    halves = 2 if MAIN == 8 else 1
    step = tl.program_id(0).to(tl.int64) * steps + tl.program_id(1)
    inside = tl.arange(0, BN)
    row = step * 64 + inside
    kk = tl.arange(0, 32)
    main_at = main + (step * (64 * halves) + inside)[:, None] * PER_ROW + kk[None, :]
    high_at = high + row[:, None] * (32 * HIGH) + kk[None, :]
    n = tl.program_id(0) * BN + inside
    out_at = out + n.to(tl.int64)[:, None] * row_stride + tl.program_id(1) * 256 + kk[None, :]
    super_word = tl.zeros((BN,), tl.uint32) if KIND[2] == 0 else tl.load(supers + row)
    d = half_bits(super_word & 0xFFFF).to(tl.float32)
    dmin = half_bits(super_word >> 16).to(tl.float32)
    halves_at = scales + step * 256 + inside[:, None] * 2 + tl.arange(0, 2)[None, :]
    for r in tl.static_range(4):
        word = tl.load(scales + step * 256 + r * 64 + inside)
        main_tile = tl.load(main_at + (r // 2 if MAIN == 2 else r) * 32)
        high_tile = tl.load(high_at + (0 if HIGH == 1 else (r // 2) * 32)) if HIGH else main_tile
        for j in tl.static_range(2):
            if MAIN == 8 and j == 1:
                main_tile = tl.load(main_at + 64 * PER_ROW + r * 32)
            if MAIN == 2:
                halves = tl.load(halves_at + (r // 2) * 128)
                codes = product_codes(main_tile, high_tile, halves, r, j, KIND, False, BN)
                w = codes.to(tl.float32) * (-d if HIGH else d)[:, None]
                if KIND[5]:
                    mins = repeated_mins(halves, r, j, False, BN).to(tl.float32)
                    w = w - mins * dmin[:, None]
            else:
                codes = signed_codes(main_tile, high_tile, r, j, KIND, False).to(tl.float32)
                first = group_scales(word, d, j, 0, KIND)
                if KIND[2] == 2:
                    second = group_scales(word, d, j, 1, KIND)
                    scale = tl.where((kk < 16)[None, :], first[:, None], second[:, None])
                else:
                    scale = tl.broadcast_to(first[:, None], (BN, 32))
                w = codes * scale
                if KIND[5]:
                    low = (small_half((word >> (16 * j + 8)) & 0xFF) - 1024.0).to(tl.float32)
                    w = w - (low * dmin)[:, None]
            at = out_at + (r * 64 + j * 32)
            tl.store(at, w.to(tl.float16), mask=(n < n_rows)[:, None])
