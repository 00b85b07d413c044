"""Embedding rows straight from a GGUF tensor's bytes, in the qblock formats of ggml.

A pass looks up a few dozen rows, so this kernel trades speed for plainness: each element finds its
own bytes. The tensor need not be repacked, and may even lie in pinned host memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""ggml's non-linear 4-bit values (IQ4_NL, IQ4_XS)."""

QBLOCK_BYTES = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
"""ggml type → elements and bytes per qblock, of the types that `embed` reads."""


def iq4_codebook(device: torch.device | str) -> Tensor:
    """The table that `embed` needs for the IQ4 types, f32 [16]."""
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)


def embed(table: Tensor, type_name: str, tokens: Tensor, codebook: Tensor, out: Tensor) -> None:
    """out[i] = row tokens[i] of the table.

    table: u8 [vocab, bytes per row], GGUF bytes. tokens: i32 [rows]. codebook: `iq4_codebook`.
    out: f32 [rows, n]. Raises ValueError for a type without a reader, or a row of another size.
    """
    if type_name not in QBLOCK_BYTES:
        raise ValueError(f"embedding type {type_name}: expected one of {', '.join(QBLOCK_BYTES)}")
    rows, n = out.shape
    elements, size = QBLOCK_BYTES[type_name]
    if table.shape[1] * elements != n * size:
        raise ValueError(
            f"{n} elements of {type_name} take {n * size // elements} bytes,"
            f" the table has {table.shape[1]} per row"
        )
    _embed[(rows, triton.cdiv(n, 512))](
        table,
        tokens,
        codebook,
        out,
        table.stride(0),
        n,
        TYPE=type_name,
        TILE=512,
        num_warps=4,
        enable_fp_fusion=False,
    )


@triton.jit
def _embed(table, tokens, codebook, out, row_bytes, n, TYPE: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = k < n
    at = table + tl.load(tokens + row).to(tl.int64) * row_bytes
    # Lanes past the end read the first element instead.
    x = _element(at, codebook, tl.where(inside, k, 0), TYPE)
    tl.store(out + row.to(tl.int64) * n + k, x, mask=inside)


@triton.jit
def _element(at, codebook, k, TYPE: tl.constexpr):
    """Elements k of the row at `at`, in f32."""
    if TYPE == "F32":
        x = _word(at + k * 4) | (_word(at + k * 4 + 2) << 16)
        x = x.to(tl.float32, bitcast=True)
    elif TYPE == "F16":
        x = _half(at + k * 2)
    elif TYPE == "BF16":
        x = (_word(at + k * 2) << 16).to(tl.float32, bitcast=True)
    elif TYPE == "Q2_K":
        x = _q2_k(at + (k // 256) * 84, k % 256)
    elif TYPE == "Q3_K":
        x = _q3_k(at + (k // 256) * 110, k % 256)
    elif TYPE == "Q4_K":
        x = _q45_k(at + (k // 256) * 144, k % 256, False)
    elif TYPE == "Q5_K":
        x = _q45_k(at + (k // 256) * 176, k % 256, True)
    elif TYPE == "Q6_K":
        x = _q6_k(at + (k // 256) * 210, k % 256)
    elif TYPE == "IQ4_XS":
        x = _iq4_xs(at + (k // 256) * 136, k % 256, codebook)
    else:
        x = _qblock32(at, k // 32, k % 32, codebook, TYPE)
    return x


@triton.jit
def _byte(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def _word(at):
    return _byte(at) | (_byte(at + 1) << 8)


@triton.jit
def _half(at):
    return _word(at).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _signed(byte):
    return tl.where(byte > 127, byte - 256, byte)


@triton.jit
def _nibble(at, k):
    """Of 32 values in 16 bytes: the first 16 lie in the low nibbles."""
    return (_byte(at + k % 16) >> (4 * (k // 16))) & 15


@triton.jit
def _qblock32(at, block, k, codebook, TYPE: tl.constexpr):
    if TYPE == "Q8_0":
        at += block * 34
        x = _half(at) * _signed(_byte(at + 2 + k)).to(tl.float32)
    elif TYPE == "Q4_0":
        at += block * 18
        x = _half(at) * (_nibble(at + 2, k) - 8).to(tl.float32)
    elif TYPE == "IQ4_NL":
        at += block * 18
        x = _half(at) * tl.load(codebook + _nibble(at + 2, k))
    elif TYPE == "Q4_1":
        at += block * 20
        x = _half(at) * _nibble(at + 4, k).to(tl.float32) + _half(at + 2)
    elif TYPE == "Q5_0":
        at += block * 22
        high = (_byte(at + 2 + k // 8) >> (k % 8)) & 1
        x = _half(at) * ((_nibble(at + 6, k) | (high << 4)) - 16).to(tl.float32)
    else:
        tl.static_assert(TYPE == "Q5_1")
        at += block * 24
        high = (_byte(at + 4 + k // 8) >> (k % 8)) & 1
        x = _half(at) * (_nibble(at + 8, k) | (high << 4)).to(tl.float32) + _half(at + 2)
    return x


@triton.jit
def _q2_k(at, k):
    shift = 2 * ((k // 32) % 4)
    q = (_byte(at + 16 + (k // 128) * 32 + k % 32) >> shift) & 3
    scale = _byte(at + k // 16)
    low = _half(at + 80) * (scale & 15).to(tl.float32) * q.to(tl.float32)
    return low - _half(at + 82) * (scale >> 4).to(tl.float32)


@triton.jit
def _q3_k(at, k):
    shift = 2 * ((k // 32) % 4)
    q = (_byte(at + 32 + (k // 128) * 32 + k % 32) >> shift) & 3
    q -= 4 - 4 * ((_byte(at + k % 32) >> (k // 32)) & 1)
    group = k // 16
    low = (_byte(at + 96 + group % 8) >> (4 * (group // 8))) & 15
    high = (_byte(at + 104 + group % 4) >> (2 * (group // 4))) & 3
    scale = (low | (high << 4)) - 32
    return _half(at + 108) * scale.to(tl.float32) * q.to(tl.float32)


@triton.jit
def _q45_k(at, k, FIVE: tl.constexpr):
    """Q4_K and Q5_K: eight groups with 6-bit scales and minimums, packed into 12 bytes."""
    group = k // 32
    early = group < 4
    here = _byte(at + 4 + group % 4)  # scale of group 0-3; its top bits belong to 4-7
    there = _byte(at + 8 + group % 4)  # likewise the minimum
    last = _byte(at + 12 + group % 4)
    scale = tl.where(early, here & 63, (last & 15) | ((here >> 6) << 4))
    least = tl.where(early, there & 63, (last >> 4) | ((there >> 6) << 4))
    nibble_shift = 4 * (group % 2)
    if FIVE:
        q = (_byte(at + 48 + (k // 64) * 32 + k % 32) >> nibble_shift) & 15
        q |= ((_byte(at + 16 + k % 32) >> group) & 1) << 4
    else:
        q = (_byte(at + 16 + (k // 64) * 32 + k % 32) >> nibble_shift) & 15
    d = _half(at) * scale.to(tl.float32)
    return d * q.to(tl.float32) - _half(at + 2) * least.to(tl.float32)


@triton.jit
def _q6_k(at, k):
    part = k // 128
    quarter = (k // 32) % 4
    low = _byte(at + part * 64 + (quarter % 2) * 32 + k % 32) >> (4 * (quarter // 2))
    high = _byte(at + 128 + part * 32 + k % 32) >> (2 * quarter)
    q = ((low & 15) | ((high & 3) << 4)) - 32
    scale = _signed(_byte(at + 192 + k // 16))
    return _half(at + 208) * scale.to(tl.float32) * q.to(tl.float32)


@triton.jit
def _iq4_xs(at, k, codebook):
    group = k // 32
    low = (_byte(at + 4 + group // 2) >> (4 * (group % 2))) & 15
    high = (_word(at + 2) >> (2 * group)) & 3
    scale = (low | (high << 4)) - 32
    value = tl.load(codebook + _nibble(at + 8 + group * 16, k % 32))
    return _half(at) * scale.to(tl.float32) * value
