"""GGUF qblocks -> words in the natural order of the A8 layout, many weights at a time.

The first half of packing: codes stay packed and are moved by shifts and masks on 64-bit words, so
that a core packs gigabytes per second; the same code runs on CUDA tensors. Block structures:
ggml-common.h of llama.cpp. The second half, panels and the A16 order, is packing_planes.py.

n rows, S steps of 256; r, j, h as in quant_tensor.py, `w` 64-bit words, `i` the 32 bytes that one
(r, j) has in each plane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

_T = GGMLQuantizationType

WIDE = torch.complex128
"""Sixteen bytes as one element: the fastest thing to permute. Nothing is computed with it."""


@dataclass(frozen=True)
class Words:
    """Some rows, on the device of the bytes they came from. Strides are free.

    main and high: WIDE, sixteen bytes of (h), in the shapes of their width:
    8 bits [n, S, j, 2, 2, h], 4 bits [n, S, 2, 2, h] (r // 2, r % 2), 2 bits [n, S, 2, h] (r // 2),
    1 bit [n, S, h]. scales: i32 [n, S, 4(r)]. super: i32 [n, S], d | dmin << 16.
    """

    main: Tensor
    high: Tensor | None
    scales: Tensor
    super: Tensor | None


def to_words(kind: GGMLQuantizationType, raw: Tensor) -> Words:
    """raw: u8 [n, whole steps of 256 weights], contiguous, 16-byte aligned in its storage."""
    size = GGML_QUANT_SIZES[kind][1] * (256 // GGML_QUANT_SIZES[kind][0])
    return _READERS[kind](raw, raw.shape[1] // size)


def _every_byte(byte: int, size: int = 8) -> int:
    """The byte in all bytes of a word, as the signed number that torch takes."""
    return int.from_bytes(bytes([byte]) * size, "little", signed=True)


def _moved(x: Tensor, left: int, byte: int) -> Tensor:
    """x shifted left (or, if negative, right), and of each byte the bits of a mask.

    Bits may be moved within their byte only: then the sign of a shift to the right is masked out.
    """
    mask = _every_byte(byte, x.element_size())
    if left == 0:
        return x & mask
    return (x << left if left > 0 else x >> -left).bitwise_and_(mask)


def merged(parts: list[tuple[Tensor, int, int]]) -> Tensor:
    """Parts (words, shift to the left, bits to keep of each byte), OR-ed."""
    first, *others = parts
    total = _moved(*first)
    for part in others:
        total |= _moved(*part)
    return total


def _halves(raw: Tensor, steps: int) -> Tensor:
    """Steps as 16-bit numbers [n, S, ...]."""
    halves: Tensor = raw.view(torch.int16).unflatten(1, (steps, -1))
    return halves


def _words(part: Tensor, *shape: int) -> Tensor:
    """A strided piece [n, S, ...] as contiguous WIDE elements [n, S, *shape]."""
    flat = part.contiguous().flatten(2)
    wide: Tensor = flat.view(WIDE).unflatten(2, shape)
    return wide


def _first(wide: Tensor, *axes: int) -> Tensor:
    """WIDE, some axes moved to the front, as contiguous 64-bit words [*axes, ..., 2w]."""
    rest = [axis for axis in range(wide.ndim) if axis not in axes]
    front = wide.permute(*axes, *rest).contiguous()
    words: Tensor = front.view(torch.int64).unflatten(-1, (-1, 2))
    return words


def _wide(words: Tensor) -> Tensor:
    """64-bit words [..., 2w] -> WIDE [...]."""
    return words.contiguous().view(WIDE).squeeze(-1)


def _k_scales(header: Tensor) -> Tensor:
    """Three words of 6-bit numbers, i32 [n, S, 3] -> (scale, min) bytes, i32 [n, S, 4]."""
    low, middle, high = header.unbind(-1)
    six, four, two = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
    words = []
    for scales, mins in (
        (low & six, middle & six),
        ((high & four) | ((low >> 2) & two), ((high >> 4) & four) | ((middle >> 2) & two)),
    ):
        for s, m in ((scales, mins), (scales >> 16, mins >> 16)):
            pairs = (s & 0xFF) | ((m & 0xFF) << 8) | ((s & 0xFF00) << 8) | ((m & 0xFF00) << 16)
            words.append(pairs)
    return torch.stack(words, dim=-1)


def _q4_k(raw: Tensor, steps: int) -> Words:
    header = raw.view(torch.int32).unflatten(1, (steps, 36))[..., :4]
    main = raw.view(WIDE).unflatten(1, (steps, 9))[..., 1:].unflatten(2, (2, 2, 2))
    return Words(main, None, _k_scales(header[..., 1:]), header[..., 0])


def _q5_k(raw: Tensor, steps: int) -> Words:
    """Fifth bits of group g = 2r + j in bit g of 32 bytes; the planes want lowest bits apart."""
    header = raw.view(torch.int32).unflatten(1, (steps, 44))[..., :4]
    wide = raw.view(WIDE).unflatten(1, (steps, 11))
    fifth = _first(wide[..., 1:3])
    nibbles = _first(wide[..., 3:].unflatten(2, (4, 2)), 2)  # [r, n, S, h, w]
    main = torch.stack(
        [
            merged([(nibbles[r], -1, 0x77), (fifth, 3 - 2 * r, 0x08), (fifth, 6 - 2 * r, 0x80)])
            for r in range(4)
        ]
    )
    return Words(
        _by_run(_wide(main)), _wide(_lowest(nibbles)), _k_scales(header[..., 1:]), header[..., 0]
    )


def _by_run(wide: Tensor) -> Tensor:
    """[r, n, S, h] -> [n, S, 2, 2, h]."""
    runs: Tensor = wide.unflatten(0, (2, 2))
    return runs.permute(2, 3, 0, 1, 4)


def _lowest(nibbles: Tensor) -> Tensor:
    """[r, ...] bytes of two nibbles -> [...] bytes: bit 2r + j is bit 0 of nibble j."""
    parts = []
    for r in range(4):
        parts += [(nibbles[r], 2 * r, 1 << 2 * r), (nibbles[r], 2 * r - 3, 2 << 2 * r)]
    return merged(parts)


def _q6_k(raw: Tensor, steps: int) -> Words:
    """Halves of 128: 64 bytes of low nibbles, then (after both halves) 32 bytes of high pairs."""
    b = _halves(raw, steps)
    low = _first(_words(b[..., :64], 2, 2, 2), 3)  # [j, n, S, r // 2, h, w]
    pairs = _first(_words(b[..., 64:96], 2, 2))  # [n, S, r // 2, h, w]
    first, second = low[0], low[1]
    even = merged([(first, -2, 0x03), (second, 2, 0x30), (pairs, 2, 0x0C), (pairs, 4, 0xC0)])
    odd = merged([(first, -6, 0x03), (second, -2, 0x30), (pairs, -2, 0x0C), (pairs, 0, 0xC0)])
    high = merged([(first, 0, 0x33), (second, 2, 0xCC)])
    main = _wide(torch.stack([even, odd])).permute(1, 2, 3, 0, 4)
    # The kernels take unsigned scale bytes: int8 with its sign bit flipped is the value + 128.
    scales = b[..., 96:104].contiguous().view(torch.int32) ^ -0x7F7F7F80
    return Words(main, _wide(high), scales, b[..., 104].to(torch.int32) & 0xFFFF)


def _q3_k(raw: Tensor, steps: int) -> Words:
    """32 bytes of third bits, 64 of low pairs, 12 bytes of 6-bit scales, d."""
    b = _halves(raw, steps)
    third = _first(_words(b[..., :16], 2))
    pairs = _first(_words(b[..., 16:48], 2, 2), 2)  # [r // 2, n, S, h, w]
    main, lowest = [], []
    for half in range(2):
        parts = [(pairs[half], -1, 0x55)]
        for q in range(4):
            parts.append((third, q + 1 - 4 * half, 2 << 2 * q))
            lowest.append((pairs[half], 4 * half - q, 1 << (4 * half + q)))
        main.append(merged(parts))
    low0, low1, high = b[..., 48:54].contiguous().view(torch.int32).unbind(-1)
    four, two = 0x0F0F0F0F, 0x30303030
    scales = [
        (low0 & four) | ((high << 4) & two),
        (low1 & four) | ((high << 2) & two),
        ((low0 >> 4) & four) | (high & two),
        ((low1 >> 4) & four) | ((high >> 2) & two),
    ]
    return Words(
        _wide(torch.stack(main)).permute(1, 2, 0, 3),
        _wide(merged(lowest)),
        torch.stack(scales, dim=-1),
        b[..., 54].to(torch.int32) & 0xFFFF,
    )


def _q2_k(raw: Tensor, steps: int) -> Words:
    """16 bytes of scale | min << 4, 64 code bytes, d, dmin."""
    b = raw.view(torch.int32).unflatten(1, (steps, 21))
    return Words(_words(b[..., 4:20], 2, 2), None, b[..., :4], b[..., 20])


def _half_scales(b: Tensor) -> Tensor:
    """fp16 numbers at the start of eight qblocks of 16-bit units -> i32 [n, S, 4]."""
    return b[..., 0].contiguous().view(torch.int32)


def _q8_0(raw: Tensor, steps: int) -> Words:
    """d and 32 int8: stored as value + 128."""
    b = _halves(raw, steps).unflatten(2, (8, 17))
    codes = b[..., 1:].contiguous().view(torch.int64) ^ _every_byte(0x80)
    main = _words(codes, 2, 2, 2, 2).permute(0, 1, 4, 2, 3, 5)
    return Words(main, None, _half_scales(b), None)


def _paired_nibbles(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Groups of 16 bytes (weights 0-15 in the low nibbles), WIDE [n, S, 4(r), 2(j)] -> bytes of
    nibble j for h = 0 and for h = 1, 64-bit words [r, n, S, 2w]."""
    low, high = _first(wide, 3, 2)
    return (
        merged([(low, 0, 0x0F), (high, 4, 0xF0)]),
        merged([(low, -4, 0x0F), (high, 0, 0xF0)]),
    )


def _of_halves(first: Tensor, second: Tensor) -> Tensor:
    """Words [r, n, S, 2w] of both h -> WIDE [n, S, 2, 2, h]."""
    both: Tensor = _wide(torch.stack([first, second])).unflatten(1, (2, 2))
    return both.permute(3, 4, 1, 2, 0)


def _q4_0(raw: Tensor, steps: int) -> Words:
    """Q4_0 and IQ4_NL: d, 16 bytes of nibbles."""
    b = _halves(raw, steps).unflatten(2, (8, 9))
    main = _of_halves(*_paired_nibbles(_words(b[..., 1:], 4, 2)))
    return Words(main, None, _half_scales(b), None)


def _q5_0(raw: Tensor, steps: int) -> Words:
    """d, 32 fifth bits, 16 bytes of nibbles."""
    b = _halves(raw, steps).unflatten(2, (8, 11))
    nibbles = _paired_nibbles(_words(b[..., 3:], 4, 2))
    bits = b[..., 1:3].contiguous().view(torch.uint8).unflatten(2, (4, 2))  # [n, S, r, j, 4]
    bits = bits.permute(3, 4, 2, 0, 1).to(torch.int64)  # [j, (h, w), r, n, S]
    # Bit b of a byte to the lowest bit of byte b: seven copies, seven bits apart, and the eighth.
    fifth = (((bits & 0x7F) * 0x0002040810204081) & _every_byte(1)) | ((bits & 0x80) << 49)
    fifth = fifth.unflatten(1, (2, 2)).permute(0, 1, 3, 4, 5, 2).contiguous()  # [j, h, r, n, S, w]
    main = [
        merged([(nibbles[h], -1, 0x77), (fifth[0, h], 3, 0x08), (fifth[1, h], 7, 0x80)])
        for h in range(2)
    ]
    high = torch.stack([_lowest(half) for half in nibbles])  # [h, n, S, w]
    return Words(_of_halves(*main), _wide(high).permute(1, 2, 0), _half_scales(b), None)


def _iq4_xs(raw: Tensor, steps: int) -> Words:
    """d, 16 bits of high scale pairs, 4 bytes of low scale nibbles, 128 code bytes."""
    b = raw.view(torch.int64).unflatten(1, (steps, 17))
    main = _of_halves(*_paired_nibbles(_words(b[..., 1:], 4, 2)))
    head = b[..., 0].contiguous().view(torch.int32).unflatten(1, (steps, 2))
    low, pairs = head[..., 1], head[..., 0] >> 16
    scales = [
        ((low >> 8 * r) & 15)
        | (((pairs >> 4 * r) & 3) << 4)
        | (((low >> (8 * r + 4)) & 15) << 16)
        | (((pairs >> (4 * r + 2)) & 3) << 20)
        for r in range(4)
    ]
    return Words(main, None, torch.stack(scales, dim=-1), head[..., 0] & 0xFFFF)


_READERS: dict[GGMLQuantizationType, Callable[[Tensor, int], Words]] = {
    _T.Q4_K: _q4_k,
    _T.Q5_K: _q5_k,
    _T.Q6_K: _q6_k,
    _T.Q3_K: _q3_k,
    _T.Q2_K: _q2_k,
    _T.Q8_0: _q8_0,
    _T.Q4_0: _q4_0,
    _T.Q5_0: _q5_0,
    _T.IQ4_NL: _q4_0,
    _T.IQ4_XS: _iq4_xs,
}
