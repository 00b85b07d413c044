"""Plain fields (codes in natural order, scales, d and dmin) -> GGUF qblocks: half of unpacking.

Block structures: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

_T = GGMLQuantizationType


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


def _rows(part: Tensor) -> Tensor:
    """[n, blocks, ...] -> [n, everything else]."""
    return part.reshape(part.shape[0], -1)


def _bytes_of(half: Tensor) -> Tensor:
    """int16 [n, blocks] -> bytes [n, blocks, 2]."""
    return half.contiguous().unsqueeze(-1).view(torch.uint8)


def _need(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a field that this type needs is missing")
    return tensor


def _join_bits(parts: Tensor, bits: int) -> Tensor:
    """[..., 8 // bits, w] numbers of `bits` bits, lowest first -> [..., w] bytes."""
    packed = parts[..., 0, :].clone()
    for index in range(1, 8 // bits):
        packed |= parts[..., index, :] << (bits * index)
    return packed


def _k_scale_bytes(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight 6-bit scales and eight 6-bit mins -> the 12 bytes of Q4_K and Q5_K."""
    low = scales[..., :4] | ((scales[..., 4:] >> 4) << 6)
    middle = mins[..., :4] | ((mins[..., 4:] >> 4) << 6)
    high = (scales[..., 4:] & 15) | ((mins[..., 4:] & 15) << 4)
    return torch.cat([low, middle, high], dim=-1)


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


def _encode_q6k(f: Fields) -> Tensor:
    n, k = f.codes.shape
    s = k // 256
    codes = f.codes.reshape(n, s, 2, 4, 32)
    low = _join_bits((codes & 15).reshape(n, s, 2, 2, 64), 4).reshape(n, s, 128)
    high = _join_bits(codes >> 4, 2).reshape(n, s, 64)
    parts = [low, high, f.scales.reshape(n, s, 16) ^ 128, _bytes_of(_need(f.d))]
    return _rows(torch.cat(parts, dim=-1))


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


def _encode_q2k(f: Fields) -> Tensor:
    n, k = f.codes.shape
    s = k // 256
    scales = (f.scales | (_need(f.mins) << 4)).reshape(n, s, 16)
    codes = _join_bits(f.codes.reshape(n, s, 2, 4, 32), 2).reshape(n, s, 64)
    parts = [scales, codes, _bytes_of(_need(f.d)), _bytes_of(_need(f.dmin))]
    return _rows(torch.cat(parts, dim=-1))


def _encode_q8_0(f: Fields) -> Tensor:
    n, k = f.codes.shape
    codes = f.codes.reshape(n, k // 32, 32) ^ 128
    return _rows(torch.cat([_bytes_of(f.scales), codes], dim=-1))


def _encode_nibbles(f: Fields, kind: GGMLQuantizationType) -> Tensor:
    n, k = f.codes.shape
    codes = f.codes.reshape(n, k // 32, 2, 16)
    parts = [_bytes_of(f.scales)]
    if kind == _T.Q5_0:
        fifth = (codes >> 4).reshape(n, k // 32, 4, 8, 1)
        parts.append(_join_bits(fifth, 1)[..., 0])
    parts.append(_join_bits(codes & 15, 4))
    return _rows(torch.cat(parts, dim=-1))


def _encode_iq4_xs(f: Fields) -> Tensor:
    n, k = f.codes.shape
    s = k // 256
    scales = f.scales.reshape(n, s, 8)
    high = _join_bits((scales >> 4).reshape(n, s, 2, 4, 1), 2)[..., 0]
    low = _join_bits((scales & 15).reshape(n, s, 4, 2, 1), 4)[..., 0]
    codes = _join_bits(f.codes.reshape(n, s, 8, 2, 16), 4).reshape(n, s, 128)
    return _rows(torch.cat([_bytes_of(_need(f.d)), high, low, codes], dim=-1))


_WRITERS: dict[GGMLQuantizationType, Callable[[Fields], Tensor]] = {
    _T.Q4_K: lambda f: _encode_k(f, _T.Q4_K),
    _T.Q5_K: lambda f: _encode_k(f, _T.Q5_K),
    _T.Q6_K: _encode_q6k,
    _T.Q3_K: _encode_q3k,
    _T.Q2_K: _encode_q2k,
    _T.Q8_0: _encode_q8_0,
    _T.Q4_0: lambda f: _encode_nibbles(f, _T.Q4_0),
    _T.Q5_0: lambda f: _encode_nibbles(f, _T.Q5_0),
    _T.IQ4_NL: lambda f: _encode_nibbles(f, _T.IQ4_NL),
    _T.IQ4_XS: _encode_iq4_xs,
}


def encode(kind: GGMLQuantizationType, fields: Fields) -> Tensor:
    """Fields -> bytes [n, row bytes]."""
    return _WRITERS[kind](fields)
