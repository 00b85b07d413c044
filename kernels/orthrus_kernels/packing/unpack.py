"""Planes -> fields of one matrix: packing undone, in plain reshapes; see quant_tensor.py.

Written apart from packing (words.py, planes.py), for plainness rather than speed:
together they show that nothing is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthrus_kernels.packing.fields import Fields
from orthrus_kernels.packing.quant_tensor import PANEL_ROWS, STEP, Layout, ScaleForm, TypeTraits

# One row of codes of a step: axes (r, j, h, c, e) of sizes (4, 2, 2, 8, 2).
_R, _J, _H, _C, _E = 4, 2, 2, 8, 2


def from_planes(planes: dict[str, Tensor], traits: TypeTraits, layout: Layout) -> Fields:
    """Planes -> padded fields."""
    codes = _unpack_codes(planes["main"], traits.main_bits, layout)
    if traits.high_bits:
        high = _unpack_codes(planes["high"], traits.high_bits, layout)
        codes = (codes << traits.high_bits) | high
    p, _, b = codes.shape[:3]
    natural = codes.reshape(p * PANEL_ROWS, b * STEP)
    scales, mins = _fields_of_words(planes["scales"], traits, layout)
    d = dmin = None
    if traits.has_super:
        words = planes["super"].view(torch.int16).reshape(p, b, PANEL_ROWS, 2)
        both = words.permute(0, 2, 1, 3).reshape(p * PANEL_ROWS, b, 2)
        d, dmin = both[..., 0], both[..., 1]
    return Fields(natural, scales, mins, d, dmin)


def _unpack_codes(plane: Tensor, bits: int, layout: Layout) -> Tensor:
    """One plane -> codes [P, 64, B, r, j, h, c, e]."""
    data = plane.view(torch.uint8)
    p, b = data.shape[:2]
    a16 = layout is Layout.A16
    if bits == 8:
        if a16:
            split = data.reshape(p, b, _J, PANEL_ROWS, _C, _R, _E, _H)
            return split.permute(0, 3, 1, 5, 2, 7, 4, 6)
        split = data.reshape(p, b, _J, PANEL_ROWS, _R, _H, _C, _E)
        return split.permute(0, 3, 1, 4, 2, 5, 6, 7)
    if bits == 4:
        if a16:
            merged = data.reshape(p, b, PANEL_ROWS, _C, _R, _E, _H).permute(0, 2, 1, 4, 6, 3, 5)
        else:
            merged = data.reshape(p, b, PANEL_ROWS, _R, _H, _C, _E).permute(0, 2, 1, 3, 4, 5, 6)
        return torch.stack([merged & 15, merged >> 4], dim=4)
    return _unpack_small(data, bits, layout)


def _unpack_small(data: Tensor, bits: int, layout: Layout) -> Tensor:
    """1- or 2-bit planes."""
    p, b = data.shape[:2]
    mask = (1 << bits) - 1
    if layout is Layout.A16:
        outer = 4 // bits
        merged = data.reshape(p, b, PANEL_ROWS, _C // outer, _R, _E, _H)
        merged = merged.permute(0, 2, 1, 4, 6, 3, 5)  # [P, 64, B, r, h, inner, e]
        by_outer = [
            torch.stack(
                [(merged >> (2 * bits * index + bits * j)) & mask for j in range(_J)], dim=4
            )
            for index in range(outer)
        ]  # [P, 64, B, r, j, h, inner, e]
        joined = torch.stack(by_outer, dim=6)
        return joined.reshape(p, PANEL_ROWS, b, _R, _J, _H, _C, _E)
    inner = 4 // bits
    merged = data.reshape(p, b, PANEL_ROWS, _R // inner, _H, _C, _E)
    merged = merged.permute(0, 2, 1, 3, 4, 5, 6)  # [P, 64, B, outer, h, c, e]
    by_inner = [
        torch.stack([(merged >> (2 * bits * index + bits * j)) & mask for j in range(_J)], dim=4)
        for index in range(inner)
    ]  # [P, 64, B, outer, j, h, c, e]
    joined = torch.stack(by_inner, dim=4)
    return joined.reshape(p, PANEL_ROWS, b, _R, _J, _H, _C, _E)


def _fields_of_words(
    words: Tensor, traits: TypeTraits, layout: Layout
) -> tuple[Tensor, Tensor | None]:
    """Scales and mins."""
    if layout is Layout.A8 and traits.main_bits == 2:
        p, b = words.shape[:2]
        data = words.view(torch.uint8).reshape(p, b, 2, PANEL_ROWS, _H, 2, _J)
        flat = data.permute(0, 3, 1, 2, 5, 6, 4).reshape(p, PANEL_ROWS, -1)
        words = flat.view(torch.uint32).reshape(p, PANEL_ROWS, b, _R).permute(0, 2, 3, 1)
    order = (0, 2, 1, 3) if layout is Layout.A16 else (0, 3, 1, 2)
    natural = words.view(torch.int32).permute(*order).contiguous()
    natural = natural.reshape(natural.shape[0] * PANEL_ROWS, -1)
    form = traits.scale_form
    if form is ScaleForm.HALF_32:
        return natural.view(torch.int16), None
    data = natural.view(torch.uint8)
    if form is ScaleForm.BYTE_16:
        return data, None
    if form is ScaleForm.MIN_32:
        return data[:, 0::2], data[:, 1::2]
    return data & 15, data >> 4
