"""GGUF bytes <-> `QuantTensor`: exact in both directions, in chunks, on the device of the bytes.

`pack` takes the raw rows of one tensor; `stack_rows` and `interleave_rows` first join the rows of
several tensors of one type (Q, K and V; gate and up), so that one launch computes them together.
"""

from __future__ import annotations

import logging

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from orthrus_kernels.activations import deinterleave, interleave
from orthrus_kernels.packing_fields import Fields, decode, encode
from orthrus_kernels.packing_planes import from_planes, to_planes
from orthrus_kernels.quant_tensor import (
    PANEL_ROWS,
    PLAIN_TYPES,
    STEP,
    TRAITS,
    Layout,
    QuantTensor,
    ScaleForm,
    TypeTraits,
    row_bytes,
)

log = logging.getLogger(__name__)

_T = GGMLQuantizationType

PAIR_ROWS = 8
"""gate and up alternate in groups of this many rows: the two 8-row halves of an MMA tile."""

_CHUNK_WEIGHTS = 1 << 24
"""Weights packed at a time: the intermediate fields take about six bytes per weight."""

_HALF_MAX = 65504.0


def pack(
    raw: Tensor,
    kind: GGMLQuantizationType,
    k: int,
    layout: Layout = Layout.A16,
    name: str = "weight",
) -> QuantTensor:
    """GGUF rows (u8 [rows, row bytes] on any device) -> QuantTensor on the same device.

    F32 becomes F16, and so does a type without kernels: both are logged with what it costs.
    ValueError where the bytes do not fit the shape, or (A16) where a weight exceeds fp16.
    """
    if raw.dtype != torch.uint8 or raw.ndim != 2 or raw.shape[1] != row_bytes(kind, k):
        raise ValueError(
            f"{name}: {kind.name} rows of {k} weights are u8 [rows, {row_bytes(kind, k)}], "
            f"found {raw.dtype} {list(raw.shape)}"
        )
    if kind in PLAIN_TYPES:
        return _pack_plain(raw, kind, k, layout, name)
    if kind not in TRAITS:
        return _pack_without_kernel(raw, kind, k, layout, name)
    rows = raw.shape[0]
    chunk = max(1, _CHUNK_WEIGHTS // k // PANEL_ROWS) * PANEL_ROWS
    pieces = [
        _pack_quantized(raw[start : start + chunk], TRAITS[kind], kind, layout, name)
        for start in range(0, rows, chunk)
    ]
    planes = {
        plane: torch.cat([piece[plane] for piece in pieces]) if len(pieces) > 1 else tensor
        for plane, tensor in pieces[0].items()
    }
    return QuantTensor(kind, rows, k, layout, planes)


def unpack(tensor: QuantTensor) -> Tensor:
    """The GGUF rows that were packed, byte for byte: u8 [rows, row bytes]."""
    if tensor.type in PLAIN_TYPES:
        return _unpack_plain(tensor)
    traits = TRAITS[tensor.type]
    chunk = max(1, _CHUNK_WEIGHTS // tensor.padded_k // PANEL_ROWS)
    panels = tensor.planes["main"].shape[0]
    pieces = []
    for start in range(0, panels, chunk):
        part = {plane: data[start : start + chunk] for plane, data in tensor.planes.items()}
        fields = _cut(from_planes(part, traits, tensor.layout), tensor.k, traits.group)
        pieces.append(encode(tensor.type, fields))
    return torch.cat(pieces)[: tensor.rows]


def stack_rows(parts: list[Tensor]) -> Tensor:
    """The rows of several tensors of one type and k, one after the other."""
    return torch.cat(parts)


def interleave_rows(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up rows in alternating groups of `PAIR_ROWS`, as the gate+up kernel wants them."""
    if gate.shape != up.shape or gate.shape[0] % PAIR_ROWS:
        raise ValueError(
            f"gate and up must have equal shapes and rows in multiples of {PAIR_ROWS}: "
            f"found {list(gate.shape)} and {list(up.shape)}"
        )
    groups = (gate.shape[0] // PAIR_ROWS, PAIR_ROWS, gate.shape[1])
    pairs = torch.stack([gate.reshape(groups), up.reshape(groups)], dim=1)
    return pairs.reshape(2 * gate.shape[0], gate.shape[1])


def largest_weight(fields: Fields, traits: TypeTraits) -> float:
    """An upper bound of |w| over the matrix: what fp16 has to hold (scale times largest code)."""
    codes = max(traits.bias, (1 << (traits.main_bits + traits.high_bits)) - 1 - traits.bias)
    if traits.scale_form is ScaleForm.HALF_32:
        return codes * _largest_half(fields.scales)
    if fields.d is None:
        raise ValueError("a type with superblocks needs d")
    scale = (fields.scales.to(torch.int16) - traits.scale_bias).abs().max().item()
    bound = codes * float(scale) * _largest_half(fields.d)
    if traits.has_min and fields.mins is not None and fields.dmin is not None:
        bound += float(fields.mins.max().item()) * _largest_half(fields.dmin)
    return bound


def _largest_half(bits: Tensor) -> float:
    # No abs() of the fp16 values first: numel may be large, and amax of |bits| orders the same.
    return float((bits & 0x7FFF).max().view(torch.float16).item())


def _pack_quantized(
    raw: Tensor, traits: TypeTraits, kind: GGMLQuantizationType, layout: Layout, name: str
) -> dict[str, Tensor]:
    fields = decode(kind, raw)
    if layout is Layout.A16:
        largest = largest_weight(fields, traits)
        if not largest <= _HALF_MAX:
            raise ValueError(
                f"{name}: {kind.name} scales allow weights of {largest:.3g}, beyond fp16 "
                f"({_HALF_MAX:.0f}): pack it in the A8 layout"
            )
    return to_planes(_pad(fields, traits.group), traits, layout)


def _pad(fields: Fields, group: int) -> Fields:
    """Zero codes and zero scales up to whole panels and steps: weights that are exactly zero."""
    rows, k = fields.codes.shape
    more_rows = -rows % PANEL_ROWS
    more_k = -k % STEP

    def grown(tensor: Tensor | None, weights: int) -> Tensor | None:
        if tensor is None:
            return None
        extra = (0, more_k // weights, 0, more_rows)
        return torch.nn.functional.pad(tensor, extra) if more_rows or more_k else tensor

    codes = grown(fields.codes, 1)
    scales = grown(fields.scales, group)
    if codes is None or scales is None:
        raise ValueError("fields without codes or scales")
    return Fields(
        codes,
        scales,
        grown(fields.mins, group),
        grown(fields.d, STEP),
        grown(fields.dmin, STEP),
    )


def _cut(fields: Fields, k: int, group: int) -> Fields:
    """Drop the padding of k (rows are cut by the caller)."""
    supers = k // STEP
    return Fields(
        fields.codes[:, :k],
        fields.scales[:, : k // group],
        None if fields.mins is None else fields.mins[:, : k // group],
        None if fields.d is None else fields.d[:, :supers],
        None if fields.dmin is None else fields.dmin[:, :supers],
    )


def _pack_plain(
    raw: Tensor, kind: GGMLQuantizationType, k: int, layout: Layout, name: str
) -> QuantTensor:
    """F16 and BF16: panels of 64 x 64 in interleaved order, numbers as they are."""
    numbers = raw.contiguous().view(torch.float16 if kind == _T.F16 else torch.bfloat16)
    if kind == _T.BF16:
        largest = float(numbers.abs().max().item())
        if not largest <= _HALF_MAX:
            raise ValueError(f"{name}: BF16 weight of {largest:.3g} is beyond fp16: use Q8_0")
    rows = numbers.shape[0]
    padded = interleave(torch.nn.functional.pad(numbers, (0, 0, 0, -rows % PANEL_ROWS)))
    panels = padded.reshape(-1, PANEL_ROWS, padded.shape[1] // 64, 64).permute(0, 2, 1, 3)
    return QuantTensor(kind, rows, k, layout, {"main": panels.contiguous()})


def _unpack_plain(tensor: QuantTensor) -> Tensor:
    panels = tensor.planes["main"].permute(0, 2, 1, 3)
    wide = deinterleave(panels.reshape(tensor.padded_rows, tensor.padded_k), tensor.k)
    return wide[: tensor.rows].contiguous().view(torch.uint8)


def _pack_without_kernel(
    raw: Tensor, kind: GGMLQuantizationType, k: int, layout: Layout, name: str
) -> QuantTensor:
    """Dequantize once to F16, and say what that costs."""
    rows = raw.shape[0]
    numbers = torch.from_numpy(dequantize(raw.cpu().numpy(), kind)).to(torch.float16)
    before, after = raw.numel() / 1e6, 2 * rows * k / 1e6
    log.warning(
        "%s: no kernel for %s, dequantized to F16: %.1f MB instead of %.1f MB, read on every pass",
        name,
        kind.name,
        after,
        before,
    )
    plain = numbers.contiguous().view(torch.uint8).reshape(rows, 2 * k).to(raw.device)
    return _pack_plain(plain, _T.F16, k, layout, name)
