"""GGUF qblocks <-> plain fields: codes in natural order, scales, d and dmin; exact both ways.

Every function works on tensors of any device: `decode(type, raw)` takes bytes [n, row bytes] and
gives `Fields`; `encode(type, fields)` gives the same bytes back. Block structures: ggml-common.h
of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL
from torch import Tensor

_T = GGMLQuantizationType

IQ4_VALUES = tuple(int(value) for value in IQ4_NL.kvalues)
"""The 16 values that IQ4 codes index (int8)."""


@dataclass(frozen=True)
class Fields:
    """One matrix taken apart; G = groups per row, S = superblocks of 256 per row.

    codes u8 [n, k]; scales u8 [n, G] or, for HALF_32, int16 fp16 bits [n, G]; mins u8 [n, G] or
    None; d and dmin int16 fp16 bits [n, S] or None.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None = None
    d: Tensor | None = None
    dmin: Tensor | None = None


def _blocks(kind: GGMLQuantizationType, raw: Tensor) -> Tensor:
    return raw.reshape(raw.shape[0], -1, GGML_QUANT_SIZES[kind][1])


def _rows(part: Tensor) -> Tensor:
    """[n, blocks, ...] -> [n, everything else]."""
    return part.reshape(part.shape[0], -1)


def _half_bits(pair: Tensor) -> Tensor:
    """Two bytes per number [n, blocks, 2] -> int16 [n, blocks]."""
    return pair.contiguous().view(torch.int16)[..., 0]


def _bytes_of(half: Tensor) -> Tensor:
    """int16 [n, blocks] -> bytes [n, blocks, 2]."""
    return half.contiguous().unsqueeze(-1).view(torch.uint8)


def _need(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a field that this type needs is missing")
    return tensor


def _split_bits(packed: Tensor, bits: int) -> Tensor:
    """[..., w] bytes -> [..., 8 // bits, w] numbers of `bits` bits, lowest first."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-2)


def _join_bits(parts: Tensor, bits: int) -> Tensor:
    """Inverse of `_split_bits`."""
    packed = parts[..., 0, :].clone()
    for index in range(1, 8 // bits):
        packed |= parts[..., index, :] << (bits * index)
    return packed


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K -> eight 6-bit scales and eight 6-bit mins."""
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=-1)
    mins = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], dim=-1)
    return scales, mins


def _k_scale_bytes(scales: Tensor, mins: Tensor) -> Tensor:
    """Inverse of `_k_scales`."""
    low = scales[..., :4] | ((scales[..., 4:] >> 4) << 6)
    middle = mins[..., :4] | ((mins[..., 4:] >> 4) << 6)
    high = (scales[..., 4:] & 15) | ((mins[..., 4:] & 15) << 4)
    return torch.cat([low, middle, high], dim=-1)


def _decode_k(raw: Tensor, kind: GGMLQuantizationType) -> Fields:
    """Q4_K: d, dmin, 12 scale bytes, 128 code bytes; Q5_K: 32 bytes of fifth bits before those."""
    b = _blocks(kind, raw)
    scales, mins = _k_scales(b[..., 4:16])
    n, s = b.shape[:2]
    codes = _split_bits(b[..., -128:].reshape(n, s, 4, 32), 4)
    if kind == _T.Q5_K:
        fifth = _split_bits(b[..., 16:48], 1).reshape(n, s, 4, 2, 32)
        codes = codes | (fifth << 4)
    return Fields(
        _rows(codes), _rows(scales), _rows(mins), _half_bits(b[..., 0:2]), _half_bits(b[..., 2:4])
    )


def _encode_k(f: Fields, kind: GGMLQuantizationType) -> Tensor:
    n, k = f.codes.shape
    s = k // 256
    codes = f.codes.reshape(n, s, 4, 2, 32)
    scale_bytes = _k_scale_bytes(f.scales.reshape(n, s, 8), _need(f.mins).reshape(n, s, 8))
    parts = [_bytes_of(_need(f.d)), _bytes_of(_need(f.dmin)), scale_bytes]
    if kind == _T.Q5_K:
        parts.append(_join_bits((codes >> 4).reshape(n, s, 8, 32), 1))
    parts.append(_join_bits(codes & 15, 4).reshape(n, s, 128))
    return _rows(torch.cat(parts, dim=-1))


def _decode_q6k(raw: Tensor) -> Fields:
    """128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d; in halves of 128 weights."""
    b = _blocks(_T.Q6_K, raw)
    n, s = b.shape[:2]
    low = _split_bits(b[..., :128].reshape(n, s, 2, 64), 4).reshape(n, s, 2, 4, 32)
    high = _split_bits(b[..., 128:192].reshape(n, s, 2, 32), 2)
    # The kernels take unsigned scale bytes: int8 with its sign bit flipped is the value + 128.
    return Fields(
        _rows(low | (high << 4)), _rows(b[..., 192:208] ^ 128), None, _half_bits(b[..., 208:210])
    )


def _encode_q6k(f: Fields) -> Tensor:
    n, k = f.codes.shape
    s = k // 256
    codes = f.codes.reshape(n, s, 2, 4, 32)
    low = _join_bits((codes & 15).reshape(n, s, 2, 2, 64), 4).reshape(n, s, 128)
    high = _join_bits(codes >> 4, 2).reshape(n, s, 64)
    parts = [low, high, f.scales.reshape(n, s, 16) ^ 128, _bytes_of(_need(f.d))]
    return _rows(torch.cat(parts, dim=-1))


def _decode_q3k(raw: Tensor) -> Fields:
    """32 bytes of third bits, 64 of low pairs, 12 bytes of 6-bit scales, d."""
    b = _blocks(_T.Q3_K, raw)
    n, s = b.shape[:2]
    third = _split_bits(b[..., :32], 1).reshape(n, s, 2, 4, 32)
    low = _split_bits(b[..., 32:96].reshape(n, s, 2, 32), 2)
    scale_low = _split_bits(b[..., 96:104], 4).reshape(n, s, 16)
    scale_high = _split_bits(b[..., 104:108], 2).reshape(n, s, 16)
    scales = scale_low | (scale_high << 4)
    return Fields(_rows(low | (third << 2)), _rows(scales), None, _half_bits(b[..., 108:110]))


def _encode_q3k(f: Fields) -> Tensor:
    n, k = f.codes.shape
    s = k // 256
    codes = f.codes.reshape(n, s, 2, 4, 32)
    scales = f.scales.reshape(n, s, 16)
    parts = [
        _join_bits((codes >> 2).reshape(n, s, 8, 32), 1),
        _join_bits(codes & 3, 2).reshape(n, s, 64),
        _join_bits((scales & 15).reshape(n, s, 2, 8), 4),
        _join_bits((scales >> 4).reshape(n, s, 4, 4), 2),
        _bytes_of(_need(f.d)),
    ]
    return _rows(torch.cat(parts, dim=-1))


def _decode_q2k(raw: Tensor) -> Fields:
    """16 bytes of scale | min << 4, 64 code bytes, d, dmin."""
    b = _blocks(_T.Q2_K, raw)
    n, s = b.shape[:2]
    codes = _split_bits(b[..., 16:80].reshape(n, s, 2, 32), 2)
    scales = b[..., :16]
    return Fields(
        _rows(codes),
        _rows(scales & 15),
        _rows(scales >> 4),
        _half_bits(b[..., 80:82]),
        _half_bits(b[..., 82:84]),
    )


def _encode_q2k(f: Fields) -> Tensor:
    n, k = f.codes.shape
    s = k // 256
    scales = (f.scales | (_need(f.mins) << 4)).reshape(n, s, 16)
    codes = _join_bits(f.codes.reshape(n, s, 2, 4, 32), 2).reshape(n, s, 64)
    parts = [scales, codes, _bytes_of(_need(f.d)), _bytes_of(_need(f.dmin))]
    return _rows(torch.cat(parts, dim=-1))


def _decode_q8_0(raw: Tensor) -> Fields:
    """d and 32 int8: stored as value + 128."""
    b = _blocks(_T.Q8_0, raw)
    return Fields(_rows(b[..., 2:] ^ 128), _half_bits(b[..., 0:2]))


def _encode_q8_0(f: Fields) -> Tensor:
    n, k = f.codes.shape
    codes = f.codes.reshape(n, k // 32, 32) ^ 128
    return _rows(torch.cat([_bytes_of(f.scales), codes], dim=-1))


def _decode_nibbles(raw: Tensor, kind: GGMLQuantizationType) -> Fields:
    """Q4_0, Q5_0 and IQ4_NL: d, (32 fifth bits,) 16 bytes of nibbles: weights 0-15, then 16-31."""
    b = _blocks(kind, raw)
    codes = _split_bits(b[..., -16:], 4).reshape(*b.shape[:2], 32)
    if kind == _T.Q5_0:
        fifth = _split_bits(b[..., 2:6, None], 1).reshape(*b.shape[:2], 32)
        codes = codes | (fifth << 4)
    if kind == _T.IQ4_NL:
        codes = _iq4_values(codes)
    return Fields(_rows(codes), _half_bits(b[..., 0:2]))


def _encode_nibbles(f: Fields, kind: GGMLQuantizationType) -> Tensor:
    n, k = f.codes.shape
    codes = f.codes if kind != _T.IQ4_NL else _iq4_codes(f.codes)
    codes = codes.reshape(n, k // 32, 2, 16)
    parts = [_bytes_of(f.scales)]
    if kind == _T.Q5_0:
        fifth = (codes >> 4).reshape(n, k // 32, 4, 8, 1)
        parts.append(_join_bits(fifth, 1)[..., 0])
    parts.append(_join_bits(codes & 15, 4))
    return _rows(torch.cat(parts, dim=-1))


def _decode_iq4_xs(raw: Tensor) -> Fields:
    """d, 16 bits of high scale pairs, 4 bytes of low scale nibbles, 128 code bytes."""
    b = _blocks(_T.IQ4_XS, raw)
    n, s = b.shape[:2]
    low = _split_bits(b[..., 4:8, None], 4).reshape(n, s, 8)
    high = _split_bits(b[..., 2:4, None], 2).reshape(n, s, 8)
    codes = _iq4_values(_split_bits(b[..., 8:].reshape(n, s, 8, 16), 4))
    scales = low | (high << 4)
    d = _half_bits(b[..., 0:2])
    zero = torch.zeros_like(scales)
    return Fields(_rows(codes), _rows(scales), _rows(zero), d, torch.zeros_like(d))


def _encode_iq4_xs(f: Fields) -> Tensor:
    n, k = f.codes.shape
    s = k // 256
    scales = f.scales.reshape(n, s, 8)
    high = _join_bits((scales >> 4).reshape(n, s, 2, 4, 1), 2)[..., 0]
    low = _join_bits((scales & 15).reshape(n, s, 4, 2, 1), 4)[..., 0]
    codes = _join_bits(_iq4_codes(f.codes).reshape(n, s, 8, 2, 16), 4).reshape(n, s, 128)
    return _rows(torch.cat([_bytes_of(_need(f.d)), high, low, codes], dim=-1))


def _iq4_values(codes: Tensor) -> Tensor:
    """Table index -> value + 128."""
    table = torch.tensor([value + 128 for value in IQ4_VALUES], dtype=torch.uint8)
    return table.to(codes.device)[codes.int()]


def _iq4_codes(values: Tensor) -> Tensor:
    """Inverse of `_iq4_values`; padding never gets here."""
    table = torch.zeros(256, dtype=torch.uint8)
    for code, value in enumerate(IQ4_VALUES):
        table[value + 128] = code
    return table.to(values.device)[values.int()]


_CODECS: dict[
    GGMLQuantizationType, tuple[Callable[[Tensor], Fields], Callable[[Fields], Tensor]]
] = {
    _T.Q4_K: (lambda raw: _decode_k(raw, _T.Q4_K), lambda f: _encode_k(f, _T.Q4_K)),
    _T.Q5_K: (lambda raw: _decode_k(raw, _T.Q5_K), lambda f: _encode_k(f, _T.Q5_K)),
    _T.Q6_K: (_decode_q6k, _encode_q6k),
    _T.Q3_K: (_decode_q3k, _encode_q3k),
    _T.Q2_K: (_decode_q2k, _encode_q2k),
    _T.Q8_0: (_decode_q8_0, _encode_q8_0),
    _T.Q4_0: (lambda r: _decode_nibbles(r, _T.Q4_0), lambda f: _encode_nibbles(f, _T.Q4_0)),
    _T.Q5_0: (lambda r: _decode_nibbles(r, _T.Q5_0), lambda f: _encode_nibbles(f, _T.Q5_0)),
    _T.IQ4_NL: (lambda r: _decode_nibbles(r, _T.IQ4_NL), lambda f: _encode_nibbles(f, _T.IQ4_NL)),
    _T.IQ4_XS: (_decode_iq4_xs, _encode_iq4_xs),
}


def decode(kind: GGMLQuantizationType, raw: Tensor) -> Fields:
    """Bytes [n, row bytes] of a quantized type -> fields."""
    return _CODECS[kind][0](raw)


def encode(kind: GGMLQuantizationType, fields: Fields) -> Tensor:
    """Fields -> bytes [n, row bytes]."""
    return _CODECS[kind][1](fields)
