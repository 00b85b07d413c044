"""GGUF bytes <-> `QuantTensor`: exact in both directions, in chunks, on the device of the bytes.

`pack` takes the raw rows of one tensor; `stack_rows` and `interleave_rows` first join the rows of
several tensors of one type (Q, K and V; gate and up), so that one launch computes them together.
"""

from __future__ import annotations

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from orthrus_kernels.elementwise.activations import deinterleave
from orthrus_kernels.packing.fields import Fields, encode
from orthrus_kernels.packing.planes import fill_planes, new_planes
from orthrus_kernels.packing.quant_tensor import (
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
from orthrus_kernels.packing.unpack import from_planes
from orthrus_kernels.packing.words import Words, to_words

_T = GGMLQuantizationType

PAIR_ROWS = 8
"""gate and up alternate in groups of this many rows: the two 8-row halves of an MMA tile."""

_UNPACKED_WEIGHTS = 1 << 24
"""Weights unpacked at a time: the intermediate fields take about six bytes per weight."""

_HALF_MAX = 65504.0


def pack(
    raw: Tensor,
    kind: GGMLQuantizationType,
    k: int,
    layout: Layout = Layout.A16,
    name: str = "weight",
    device: torch.device | str | None = None,
) -> QuantTensor:
    """GGUF rows (u8 [rows, row bytes] on any device) -> QuantTensor on `device`, or where they are.

    The bytes go to the device as they are, some rows at a time, and are packed there. The host
    waits once, at the end, for the largest scale. ValueError where the bytes do not fit the shape,
    for a type without kernels, or (A16) where a weight may exceed fp16.
    """
    if raw.dtype != torch.uint8 or raw.ndim != 2 or raw.shape[1] != row_bytes(kind, k):
        raise ValueError(
            f"{name}: {kind.name} rows of {k} weights are u8 [rows, {row_bytes(kind, k)}], "
            f"found {raw.dtype} {list(raw.shape)}"
        )
    target = raw.device if device is None else torch.device(device)
    if kind not in TRAITS and kind not in PLAIN_TYPES:
        raise ValueError(f"{name}: {kind.name} has no kernel: dequantize it to F16")
    rows, steps = raw.shape[0], -(-k // STEP)
    packed = empty_tensor(kind, rows, k, layout, target)
    planes = packed.planes
    chunk = max(1, _chunk_weights(target) // (steps * STEP * PANEL_ROWS)) * PANEL_ROWS
    largest = []
    for start in range(0, rows, chunk):
        part = _padded(raw[start : start + chunk].to(target, non_blocking=True), kind, steps)
        panel = start // PANEL_ROWS
        if kind in PLAIN_TYPES:
            largest.append(_fill_plain(planes["main"], panel, part))
        else:
            words = to_words(kind, part)
            fill_planes(planes, panel, words, TRAITS[kind], layout)
            largest.append(_largest_scales(words, TRAITS[kind]))
    if kind == _T.BF16 or (kind in TRAITS and layout is Layout.A16):
        _refuse_beyond_half(torch.stack(largest).amax(0).tolist(), kind, name)
    return packed


def empty_tensor(
    kind: GGMLQuantizationType, rows: int, k: int, layout: Layout, device: torch.device
) -> QuantTensor:
    """Uninitialised planes of a matrix of a type with kernels."""
    panels, steps = -(-rows // PANEL_ROWS), -(-k // STEP)
    if kind not in PLAIN_TYPES:
        planes = new_planes(TRAITS[kind], panels, steps, layout, device)
        return QuantTensor(kind, rows, k, layout, planes)
    dtype = torch.float16 if kind == _T.F16 else torch.bfloat16
    main = torch.empty(panels, 4 * steps, PANEL_ROWS, 64, dtype=dtype, device=device)
    return QuantTensor(kind, rows, k, layout, {"main": main})


def unpack(tensor: QuantTensor) -> Tensor:
    """The GGUF rows that were packed, byte for byte: u8 [rows, row bytes]."""
    if tensor.type in PLAIN_TYPES:
        return _unpack_plain(tensor)
    traits = TRAITS[tensor.type]
    chunk = max(1, _UNPACKED_WEIGHTS // tensor.padded_k // PANEL_ROWS)
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


def _chunk_weights(device: torch.device) -> int:
    """Weights packed at a time: temporaries that fit a core's cache, or fill a GPU for a moment."""
    return 1 << 22 if device.type == "cpu" else 1 << 25


def _padded(raw: Tensor, kind: GGMLQuantizationType, steps: int) -> Tensor:
    """Zero bytes up to whole panels and steps: scales of zero, weights that are exactly zero."""
    more_rows = -raw.shape[0] % PANEL_ROWS
    more_bytes = row_bytes(kind, steps * STEP) - raw.shape[1]
    if more_rows or more_bytes:
        return torch.nn.functional.pad(raw, (0, more_bytes, 0, more_rows))
    # Packing views the bytes as words of up to 16 bytes.
    return raw.clone() if raw.storage_offset() % 16 or not raw.is_contiguous() else raw


def _largest_scales(words: Words, traits: TypeTraits) -> Tensor:
    """fp16 bits of the largest |d| and |dmin| (HALF_32: scale), i32 [2] on the device."""
    source = words.scales if words.super is None else words.super
    both = source & 0x7FFF7FFF
    return torch.stack([(both & 0xFFFF).amax(), (both >> 16).amax()])


def _refuse_beyond_half(largest: list[int], kind: GGMLQuantizationType, name: str) -> None:
    """ValueError if weights of such scales (bits, `_largest_scales`) may lie beyond fp16."""
    if kind == _T.BF16:
        (bound,) = torch.tensor(largest[:1], dtype=torch.int16).view(torch.bfloat16).tolist()
        advice = "use Q8_0"
    else:
        first, second = torch.tensor(largest, dtype=torch.int16).view(torch.float16).tolist()
        traits = TRAITS[kind]
        codes = max(traits.bias, (1 << (traits.main_bits + traits.high_bits)) - 1 - traits.bias)
        if traits.scale_form is ScaleForm.HALF_32:
            bound = codes * max(first, second)
        else:
            scale, low = traits.largest_codes
            bound = codes * scale * first + low * second
        advice = "pack it in the A8 layout"
    if not bound <= _HALF_MAX:
        raise ValueError(
            f"{name}: {kind.name} scales allow weights of {bound:.3g}, beyond fp16 "
            f"({_HALF_MAX:.0f}): {advice}"
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


def _fill_plain(plane: Tensor, first_panel: int, raw: Tensor) -> Tensor:
    """F16 and BF16: panels of 64 x 64 in interleaved order, numbers as they are; largest |bits|."""
    pairs = raw.view(torch.int32)
    # k = 64r + 2i + e of a step stands at 8i + 2r + e: block i // 8 of 64 columns, row i % 8.
    panels = pairs.reshape(-1, PANEL_ROWS, pairs.shape[1] * 2 // STEP, 4, 4, 8)
    target = plane[first_panel : first_panel + panels.shape[0]].view(torch.int32)
    target.unflatten(3, (8, 4)).unflatten(1, (-1, 4)).copy_(panels.permute(0, 2, 4, 1, 5, 3))
    both = pairs & 0x7FFF7FFF
    return torch.maximum((both & 0xFFFF).amax(), (both >> 16).amax()).reshape(1)


def _unpack_plain(tensor: QuantTensor) -> Tensor:
    panels = tensor.planes["main"].permute(0, 2, 1, 3)
    wide = deinterleave(panels.reshape(tensor.padded_rows, tensor.padded_k), tensor.k)
    return wide[: tensor.rows].contiguous().view(torch.uint8)
