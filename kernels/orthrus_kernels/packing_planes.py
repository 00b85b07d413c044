"""Fields of one matrix <-> the planes that the kernels read; see quant_tensor.py for the orders.

Everything is reshape, permute and OR, on any device. The input is padded already: rows to 64,
k to 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthrus_kernels.packing_fields import Fields
from orthrus_kernels.quant_tensor import PANEL_ROWS, STEP, Layout, ScaleForm, TypeTraits

# One row of codes of a step: axes (r, j, h, c, e) of sizes (4, 2, 2, 8, 2).
_R, _J, _H, _C, _E = 4, 2, 2, 8, 2


def to_planes(fields: Fields, traits: TypeTraits, layout: Layout) -> dict[str, Tensor]:
    """Padded fields -> planes."""
    codes = _natural(fields.codes)
    high_mask = (1 << traits.high_bits) - 1
    planes = {"main": _pack_codes(codes >> traits.high_bits, traits.main_bits, layout)}
    if traits.high_bits:
        planes["high"] = _pack_codes(codes & high_mask, traits.high_bits, layout)
    planes["scales"] = _scale_words(fields, traits, layout)
    if traits.has_super:
        planes["super"] = _super_words(fields)
    return planes


def from_planes(planes: dict[str, Tensor], traits: TypeTraits, layout: Layout) -> Fields:
    """Inverse of `to_planes`."""
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


def _natural(codes: Tensor) -> Tensor:
    """[rows, k] -> [P, 64, B, r, j, h, c, e]."""
    rows, k = codes.shape
    return codes.reshape(rows // PANEL_ROWS, PANEL_ROWS, k // STEP, _R, _J, _H, _C, _E)


def _pack_codes(codes: Tensor, bits: int, layout: Layout) -> Tensor:
    """[P, 64, B, r, j, h, c, e] codes of `bits` bits -> one plane."""
    if bits == 8:
        # one byte per code; the two j in planes of their own
        a16 = (0, 2, 4, 1, 6, 3, 7, 5)
        plane = codes.permute(a16 if layout is Layout.A16 else (0, 2, 4, 1, 3, 5, 6, 7))
        shape: tuple[int, ...] = (*plane.shape[:4], 128)
    elif bits == 4:
        merged = codes[:, :, :, :, 0] | (codes[:, :, :, :, 1] << 4)  # [P, 64, B, r, h, c, e]
        plane = merged.permute(
            (0, 2, 1, 5, 3, 6, 4) if layout is Layout.A16 else (0, 2, 1, 3, 4, 5, 6)
        )
        shape = (*plane.shape[:3], 128)
    else:
        plane = _pack_small(codes, bits, layout)
        shape = (*plane.shape[:3], 32 * bits)
    return _view(plane.contiguous().reshape(shape), bits, layout)


def _view(plane: Tensor, bits: int, layout: Layout) -> Tensor:
    """A16 reads 16-bit elements, A8 bytes in runs of 32."""
    if layout is Layout.A16:
        return plane.view(torch.uint16)
    if bits == 1:
        return plane
    return plane.reshape(*plane.shape[:-1], plane.shape[-1] // 32, 32)


def _pack_small(codes: Tensor, bits: int, layout: Layout) -> Tensor:
    """1- or 2-bit codes -> [P, B, 64, ...] bytes."""
    p, _, b = codes.shape[:3]
    if layout is Layout.A16:
        # c = inner * outer_index + inner_index; the byte holds (outer_index, j)
        outer = 4 // bits
        split = codes.reshape(p, PANEL_ROWS, b, _R, _J, _H, outer, _C // outer, _E)
        merged = torch.zeros_like(split[:, :, :, :, 0, :, 0])  # [P, 64, B, r, h, inner, e]
        for index in range(outer):
            for j in range(_J):
                merged |= split[:, :, :, :, j, :, index] << (2 * bits * index + bits * j)
        return merged.permute(0, 2, 1, 5, 3, 6, 4)
    # the byte holds (r % inner, j)
    inner = 4 // bits
    split = codes.reshape(p, PANEL_ROWS, b, _R // inner, inner, _J, _H, _C, _E)
    merged = torch.zeros_like(split[:, :, :, :, 0, 0])  # [P, 64, B, outer, h, c, e]
    for index in range(inner):
        for j in range(_J):
            merged |= split[:, :, :, :, index, j] << (2 * bits * index + bits * j)
    return merged.permute(0, 2, 1, 3, 4, 5, 6)


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
    """Inverse of `_pack_small`."""
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


def _scale_words(fields: Fields, traits: TypeTraits, layout: Layout) -> Tensor:
    """Scales (and mins) of 64 weights -> one u32; [P, B, 64, 4] or [P, B, 4, 64]."""
    form = traits.scale_form
    if form is ScaleForm.HALF_32 or form is ScaleForm.BYTE_16:
        words = fields.scales.contiguous()
    elif fields.mins is None:
        raise ValueError(f"{form.name} needs mins")
    elif form is ScaleForm.MIN_32:
        words = torch.stack([fields.scales, fields.mins], dim=-1)
    else:
        words = fields.scales | (fields.mins << 4)
    n = words.shape[0]
    words = words.reshape(n, -1).view(torch.int32).reshape(n // PANEL_ROWS, PANEL_ROWS, -1, _R)
    order = (0, 2, 1, 3) if layout is Layout.A16 else (0, 2, 3, 1)
    return words.permute(*order).contiguous().view(torch.uint32)


def _fields_of_words(
    words: Tensor, traits: TypeTraits, layout: Layout
) -> tuple[Tensor, Tensor | None]:
    """Inverse of `_scale_words`: scales and mins."""
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


def _super_words(fields: Fields) -> Tensor:
    """d | dmin << 16 -> u32 [P, B, 64]."""
    if fields.d is None:
        raise ValueError("a type with superblocks needs d")
    dmin = torch.zeros_like(fields.d) if fields.dmin is None else fields.dmin
    n, s = fields.d.shape
    words = torch.stack([fields.d, dmin], dim=-1).contiguous().view(torch.int32)
    words = words.reshape(n // PANEL_ROWS, PANEL_ROWS, s).permute(0, 2, 1)
    return words.contiguous().view(torch.uint32)
