"""Matrix products over packed GGUF weights: the functions that launch the kernels.

Every function takes its tile and split explicitly (`dispatch.choose` finds them) and writes into
`out` if given one, so that a captured CUDA graph keeps its buffers. Rows of x: up to 64 in one
launch make sense; more are computed in row tiles. The same names in plain torch, with the same
signatures: plain.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from gguf import GGMLQuantizationType
from torch import Tensor

from orthrus_kernels.elementwise.activation_rows import (
    Int8Rows,
    new_f16_rows,
    row_pointers,
    row_strides,
)
from orthrus_kernels.overlap import overlapped
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, STEP, TRAITS, Layout, QuantTensor
from orthrus_kernels.products.a8 import gate_up_a8, head_a8, matmul_a8
from orthrus_kernels.products.a16 import gate_up_a16, head_a16, matmul_a16
from orthrus_kernels.products.dispatch import Tile

Activations = Tensor | Int8Rows
"""For A16 weights f16 [rows, padded k], interleaved (activations.py); for A8 weights Int8Rows."""

Kind = tuple[int, int, int, int, int, bool, bool]


@dataclass(frozen=True)
class Top2:
    """What each tile of a head's columns leaves of each row, for `sample.pick`.

    values: f32 [3, tiles, rows], the largest value, the second, and the sum of exp(value -
    largest). tokens: i32 [2, tiles, rows], the columns of the two (the lowest on ties).
    """

    values: Tensor
    tokens: Tensor


def kind_of(kind: GGMLQuantizationType) -> Kind:
    """What kernels specialise on: main and high bits, scale form, bias, scale bias, min, table."""
    if kind in PLAIN_TYPES:
        return (16, 0, 0, 0, 0, False, False)
    traits = TRAITS[kind]
    return (
        traits.main_bits,
        traits.high_bits,
        int(traits.scale_form),
        traits.bias,
        traits.scale_bias,
        traits.has_min,
        traits.table,
    )


def use_asm() -> bool:
    """Inline assembly, except in the interpreter."""
    return not triton.knobs.runtime.interpret


def rows_of(x: Activations) -> int:
    """Rows of either kind of activations."""
    return (x.quants if isinstance(x, Int8Rows) else x).shape[0]


def matmul(
    x: Activations,
    weight: QuantTensor,
    tile: Tile,
    split: int = 1,
    second: QuantTensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Partials f32 [split, rows, weight.rows (+ second.rows)]; their sum in order is x W^T.

    `second` continues the columns with a matrix of another type in the same launch (Q and K of one
    type, V of another). `split` 1 gives the product itself: the logits, with the head's weight.
    """
    _check(x, weight, second)
    rows = rows_of(x)
    columns = weight.rows + (second.rows if second else 0)
    out = _output(out, (split, rows, columns), torch.float32, weight.device)
    tiles = _tiles(weight, tile) + (_tiles(second, tile) if second else 0)
    planes = (*plane_arguments(weight), *plane_arguments(second or weight))
    sizes = (rows, weight.rows, second.rows if second else 0, weight.padded_k // STEP)
    grid = (tiles, split, triton.cdiv(rows, tile.rows))
    a, b = kind_of(weight.type), kind_of(second.type) if second else None
    if isinstance(x, Int8Rows):
        matmul_a8[grid](
            *row_pointers(x), *planes, out, *sizes, *_int8_sizes(x), out.stride(0),
            A=a, B=b, K_TAIL=weight.k % STEP != 0, ASM=use_asm(), BM=tile.rows, BN=tile.n,
            SPLIT=split, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=False, **overlapped(),
        )  # fmt: skip
    else:
        matmul_a16[grid](
            x, *planes, out, *sizes, x.stride(0), out.stride(0),
            A=a, B=b, ASM=use_asm(), BM=tile.rows, BN=tile.n,
            SPLIT=split, num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=False, **overlapped(),
        )  # fmt: skip
    return out


def gate_up(
    x: Activations, weight: QuantTensor, tile: Tile, out: Activations | None = None
) -> Activations:
    """silu(gate) * up in one launch; `weight` from `packing.interleave_rows`.

    out: f16 [rows, padded n / 2] interleaved, whose padding must hold zeros; or Int8Rows.
    """
    _check(x, weight, None)
    rows, columns = rows_of(x), weight.rows // 2
    if out is None:
        out = new_f16_rows(rows, columns, weight.device)
    int8 = isinstance(out, Int8Rows)
    if int8 and columns % 32:
        raise ValueError(f"gate+up to int8 rows: {columns} columns are not a multiple of 32")
    targets, target_strides = row_pointers(out), row_strides(out)
    sizes = (rows, weight.rows, weight.padded_k // STEP)
    grid = (_tiles(weight, tile), 1, triton.cdiv(rows, tile.rows))
    if isinstance(x, Int8Rows):
        gate_up_a8[grid](
            *row_pointers(x), *plane_arguments(weight), *targets, *sizes, *_int8_sizes(x),
            *target_strides, KIND=kind_of(weight.type), INT8=int8, K_TAIL=weight.k % STEP != 0,
            ASM=use_asm(), BM=tile.rows, BN=tile.n, STAGES=tile.stages, num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False, **overlapped(),
        )  # fmt: skip
    else:
        gate_up_a16[grid](
            x, *plane_arguments(weight), *targets, *sizes, x.stride(0), *target_strides,
            KIND=kind_of(weight.type), INT8=int8, ASM=use_asm(), BM=tile.rows, BN=tile.n,
            num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=False, **overlapped(),
        )  # fmt: skip
    return out


def head_top2(x: Activations, weight: QuantTensor, tile: Tile) -> Top2:
    """The largest logits, their tokens and what probabilities need, by tile: `sample.pick` takes it
    from there, and no logits are stored."""
    _check(x, weight, None)
    rows, tiles = rows_of(x), _tiles(weight, tile)
    out = Top2(
        torch.empty(3, tiles, rows, device=weight.device),
        torch.empty(2, tiles, rows, dtype=torch.int32, device=weight.device),
    )
    sizes = (rows, weight.rows, weight.padded_k // STEP)
    grid = (tiles, 1, triton.cdiv(rows, tile.rows))
    if isinstance(x, Int8Rows):
        head_a8[grid](
            *row_pointers(x), *plane_arguments(weight), out.values, out.tokens, *sizes,
            *_int8_sizes(x), KIND=kind_of(weight.type), K_TAIL=weight.k % STEP != 0, ASM=use_asm(),
            BM=tile.rows, BN=tile.n, STAGES=tile.stages, num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False, **overlapped(),
        )  # fmt: skip
    else:
        head_a16[grid](
            x, *plane_arguments(weight), out.values, out.tokens, *sizes, x.stride(0),
            KIND=kind_of(weight.type), ASM=use_asm(), BM=tile.rows, BN=tile.n,
            num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=False, **overlapped(),
        )  # fmt: skip
    return out


def sum_partials(partials: Tensor) -> Tensor:
    """The parts of a split added in order: [split, rows, columns] -> [rows, columns]."""
    total = partials[0].clone()
    for part in partials[1:]:
        total += part
    return total


def _check(x: Activations, weight: QuantTensor, second: QuantTensor | None) -> None:
    """Shapes and layouts, where a mismatch would read out of bounds."""
    for tensor in (weight, *([second] if second else [])):
        int8 = isinstance(x, Int8Rows)
        if tensor.type not in PLAIN_TYPES and int8 != (tensor.layout is Layout.A8):
            raise ValueError(
                f"{tensor.type.name} is packed for {tensor.layout.value} activations, "
                f"found {'int8' if int8 else 'fp16'} rows"
            )
        if int8 and tensor.type in PLAIN_TYPES:
            raise ValueError(f"{tensor.type.name} takes fp16 rows, found int8")
        if tensor.k != weight.k:
            raise ValueError(f"matrices of one launch differ in k: {weight.k} and {tensor.k}")
    if isinstance(x, Int8Rows):
        if x.quants.shape[1:] != (weight.k // 32, 32):
            raise ValueError(
                f"x of {list(x.quants.shape)} for k = {weight.k}: expected "
                f"[rows, {weight.k // 32}, 32]"
            )
    elif x.dtype != torch.float16 or x.shape[1] != weight.padded_k or x.stride(1) != 1:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} for k = {weight.k}: expected contiguous interleaved "
            f"f16 rows of {weight.padded_k}"
        )


def _output(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype,
            device: torch.device) -> Tensor:  # fmt: skip
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or not out[0].is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, expected {dtype} {list(shape)}")
    return out


def _tiles(weight: QuantTensor, tile: Tile) -> int:
    if weight.padded_rows % tile.n:
        raise ValueError(
            f"tile of {tile.n} does not divide {weight.padded_rows} padded rows: use "
            "dispatch.fit_tile"
        )
    return -(-weight.rows // tile.n)


def plane_arguments(weight: QuantTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four plane arguments; a plane that the type lacks is never read."""
    planes = weight.planes
    main = planes["main"]
    scales = planes.get("scales", main)
    return main, planes.get("high", main), scales, planes.get("super", scales)


def _int8_sizes(x: Int8Rows) -> tuple[int, int, int, int, int]:
    return (x.quants.shape[1], *row_strides(x))
