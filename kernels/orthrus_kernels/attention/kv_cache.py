"""Keys and values on the device: their layout in f16, q8_0 and q4_0, and how kernels find them.

Quantized caches hold exactly the numbers of ggml's q8_0 and q4_0 qblocks (32 values share one f16
scale, same rounding), but in planes of their own instead of ggml's 34- and 18-byte structs: those
are aligned to 2 bytes only, and a GPU wants 16-byte loads. Each kv head is contiguous over
positions, so that the tile of one program is one run of memory.

    f16   values f16 [heads, capacity, d]
    q8_0  values u8  [heads, capacity, d]    = q + 128      scales f16 [heads, capacity, d/32]
    q4_0  values u8  [heads, capacity, h]    = q + 8: value c in the low nibble of byte c, value
                                               c + h in its high one; scales as for q8_0

h is the first of `halves(d)`: half the head where d is a power of two, 64 where it is 96. q8_0 is
stored with an offset so that a byte becomes an f16 by OR-ing 0x6400 in, without a conversion.

The cache of a sequence holds all layers in one piece, [layers, heads, capacity, ...]. A pass may
serve any sequences, and a CUDA graph of it must outlive them all. So kernels get no pointers to
caches: they get one fixed address (`Caches.anchor`), and a table of how far from it the caches lie
that the rows of this pass belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

QBLOCK = 32
HEAD_DIMS = (64, 80, 96, 128, 256)

FORMATS = {"f16": 0, "q8_0": 1, "q4_0": 2}
"""Cache types by llama.cpp's names, and the constant that kernels know them by."""


def halves(head_dim: int) -> tuple[int, int]:
    """Columns of the two tiles that a head is cut into: powers of two, the first not smaller."""
    low = triton.next_power_of_2(head_dim) // 2
    return low, head_dim - low


UNIT = 16
"""Bytes that offsets of planes count in: so that the compiler knows how they are aligned."""

ENTRY = 5
"""Columns of `Caches.entries`: offsets of key values, key scales, value values, value scales; and
the capacity."""


@dataclass(frozen=True)
class KvPlanes:
    """Keys or values, of one layer or of all. `scales` is one unit of nothing for f16."""

    type_name: str
    head_dim: int
    values: Tensor
    scales: Tensor

    @property
    def heads(self) -> int:
        return self.values.shape[-3]

    @property
    def capacity(self) -> int:
        return self.values.shape[-2]

    def layer(self, index: int) -> KvPlanes:
        """The planes of one layer, of planes of all."""
        scales = self.scales if self.type_name == "f16" else self.scales[index]
        return KvPlanes(self.type_name, self.head_dim, self.values[index], scales)


@dataclass(frozen=True)
class Caches:
    """The caches that the rows of a pass may belong to.

    anchor: u8, what offsets are counted from. entries: i64 [sequences, ENTRY], see `cache_entry`.
    held: the keys and values that the entries stand for, for implementations in plain torch; the
        same list for all passes, filled anew before each.
    """

    type_k: str
    type_v: str
    heads: int
    head_dim: int
    anchor: Tensor
    entries: Tensor
    held: list[tuple[KvPlanes, KvPlanes]]

    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The anchor in the types of the four planes of an entry."""
        half = self.anchor.view(torch.float16)
        keys, values = (half if name == "f16" else self.anchor for name in self.types)
        return keys, half, values, half

    @property
    def types(self) -> tuple[str, str]:
        return self.type_k, self.type_v


def cache_entry(keys: KvPlanes, values: KvPlanes, anchor: Tensor) -> tuple[int, ...]:
    """The row of `Caches.entries` for a cache of one sequence."""
    offsets = []
    for plane in (keys.values, keys.scales, values.values, values.scales):
        distance = plane.data_ptr() - anchor.data_ptr()
        if distance % UNIT:
            raise ValueError(f"planes lie {distance} bytes apart, not a multiple of {UNIT}")
        offsets.append(distance // UNIT)
    return (*offsets, keys.capacity)


def new_planes(
    type_name: str,
    heads: int,
    capacity: int,
    head_dim: int,
    device: torch.device | str,
    layers: int | None = None,
) -> KvPlanes:
    """Uninitialised planes, of one layer unless `layers` is given: nothing reads a row before it
    has been written.

    Raises ValueError for an unknown type, or a head that does not consist of whole qblocks.
    """
    if type_name not in FORMATS:
        raise ValueError(f"cache type {type_name!r}: expected one of {', '.join(FORMATS)}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim}: expected one of {HEAD_DIMS}")
    outer = (heads, capacity) if layers is None else (layers, heads, capacity)
    if type_name == "f16":
        values = torch.empty(*outer, head_dim, dtype=torch.float16, device=device)
        scales = torch.empty(UNIT // 2, dtype=torch.float16, device=device)
        return KvPlanes(type_name, head_dim, values, scales)
    if head_dim % QBLOCK:
        raise ValueError(
            f"cache type {type_name} needs a head_dim divisible by {QBLOCK}, found {head_dim};"
            " use f16"
        )
    width = head_dim if type_name == "q8_0" else halves(head_dim)[0]
    values = torch.empty(*outer, width, dtype=torch.uint8, device=device)
    scales = torch.empty(*outer, head_dim // QBLOCK, dtype=torch.float16, device=device)
    return KvPlanes(type_name, head_dim, values, scales)


def dequantize_planes(planes: KvPlanes) -> Tensor:
    """All values as f32 [..., heads, capacity, head_dim], in plain torch."""
    if planes.type_name == "f16":
        return planes.values.float()
    if planes.type_name == "q8_0":
        quants = planes.values.float() - 128
    else:
        quants = torch.cat([planes.values & 15, planes.values >> 4], dim=-1).float() - 8
        quants = quants[..., : planes.head_dim]
    return quants * planes.scales.float().repeat_interleave(QBLOCK, dim=-1)


def move_columns(caches: Caches, moves: Tensor, layers: int) -> None:
    """Copy the keys and values of rows to other places of the same cache, in every layer.

    moves: i32 [moves, 3]: sequence (-1: nothing to do), from, to. No target is another's source.
    """
    head_dim = caches.head_dim
    for keys in (True, False):
        name = caches.types[0 if keys else 1]
        values, scales = caches.pointers()[0:2] if keys else caches.pointers()[2:4]
        width = halves(head_dim)[0] if name == "q4_0" else head_dim
        _move[(moves.shape[0], layers * caches.heads)](
            caches.entries,
            values,
            scales,
            moves,
            FIRST=0 if keys else 2,
            WIDTH=width,
            SPAN=triton.next_power_of_2(width),
            GROUPS=head_dim // QBLOCK,
            FORMAT=FORMATS[name],
            num_warps=1,
        )


@triton.jit
def _move(
    entries,
    values,
    scales,
    moves,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Program (move, layer and head)."""
    at = moves + tl.program_id(0) * 3
    sequence = tl.load(at)
    if sequence < 0:
        return
    values, scales, capacity = planes_of(entries, sequence, values, scales, FIRST, FORMAT)
    base = tl.program_id(1).to(tl.int64) * capacity
    source, target = base + tl.load(at + 1), base + tl.load(at + 2)
    c = tl.arange(0, SPAN)
    row = tl.load(values + source * WIDTH + c, mask=c < WIDTH)
    tl.store(values + target * WIDTH + c, row, mask=c < WIDTH)
    if FORMAT != 0:
        g = tl.arange(0, 8)
        groups = tl.load(scales + source * GROUPS + g, mask=g < GROUPS)
        tl.store(scales + target * GROUPS + g, groups, mask=g < GROUPS)


@triton.jit
def planes_of(entries, sequence, values, scales, FIRST: tl.constexpr, FORMAT: tl.constexpr):
    """Pointers to the planes of a sequence's keys (FIRST 0) or values (2), and the capacity.

    values, scales: the anchor, in the types of the planes.
    """
    at = entries + sequence.to(tl.int64) * 5
    values += tl.load(at + FIRST) * (8 if FORMAT == 0 else 16)
    scales += tl.load(at + FIRST + 1) * 8
    return values, scales, tl.load(at + 4)


@triton.jit
def load_halves(
    values,
    scales,
    base,
    place,
    mask,
    KEYS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The first LOW and the other HIGH elements of KEYS rows of the cache, as two f16 tiles.

    base: i64 scalar, index of the head's first row over all heads. place: i32 [KEYS], rows of the
    head. Masked rows give zeros.
    """
    n = place
    low = tl.arange(0, LOW)
    high = tl.arange(0, HIGH)
    there = mask[:, None]
    D: tl.constexpr = LOW + HIGH
    if FORMAT == 0:
        at = values + base * D + n[:, None] * D
        x_low = tl.load(at + low[None, :], mask=there, other=0.0)
        x_high = tl.load(at + LOW + high[None, :], mask=there, other=0.0)
    else:
        GROUPS: tl.constexpr = D // 32
        at_scale = scales + base * GROUPS + n[:, None] * GROUPS
        d_low = tl.load(at_scale + tl.arange(0, LOW // 32)[None, :], mask=there, other=0.0)
        g_high = LOW // 32 + tl.arange(0, HIGH // 32)
        d_high = tl.load(at_scale + g_high[None, :], mask=there, other=0.0)
        if FORMAT == 1:
            at = values + base * D + n[:, None] * D
            u_low = tl.load(at + low[None, :], mask=there, other=0)
            u_high = tl.load(at + LOW + high[None, :], mask=there, other=0)
            x_low = _scaled(u_low, d_low, 128, KEYS, LOW)
            x_high = _scaled(u_high, d_high, 128, KEYS, HIGH)
        else:
            at = values + base * LOW + n[:, None] * LOW
            both = tl.load(at + low[None, :], mask=there, other=0)
            also = both
            if HIGH < LOW:
                also = tl.load(at + high[None, :], mask=there, other=0)
            x_low = _scaled(both & 15, d_low, 8, KEYS, LOW)
            x_high = _scaled(also >> 4, d_high, 8, KEYS, HIGH)
    return x_low, x_high


@triton.jit
def _scaled(u, d, OFFSET: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """(u - OFFSET) * d in f16, for u8 `u` [KEYS, WIDTH] and one scale per 32 columns."""
    # 0x6400 is 1024 in f16, whose last bit counts ones: OR-ing u in gives 1024 + u exactly.
    whole = (u.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    shift = tl.full((1, 1), 1024 + OFFSET, tl.float16)
    quants = tl.reshape(whole - shift, (KEYS, WIDTH // 32, 32))
    return tl.reshape(quants * d[:, :, None], (KEYS, WIDTH))


@triton.jit
def store_head(
    x, values, scales, position, D: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr
):
    """Write one head row, f32 [WIDTH] with zeros from D on, at i64 index `position`."""
    c = tl.arange(0, WIDTH)
    if FORMAT == 0:
        tl.store(values + position * D + c, x.to(tl.float16), mask=c < D)
    else:
        GROUPS: tl.constexpr = D // 32
        groups = tl.reshape(x, (WIDTH // 32, 32))
        g = tl.arange(0, WIDTH // 32)
        if FORMAT == 1:
            d = tl.div_rn(tl.max(tl.abs(groups), 1), tl.full((WIDTH // 32,), 127.0, tl.float32))
        else:
            # The element of largest magnitude, with its sign; the first one on a draw, as in ggml.
            extreme = tl.argmax(tl.abs(groups), 1, tie_break_left=True)
            at_extreme = tl.arange(0, 32)[None, :] == extreme[:, None]
            d = tl.sum(tl.where(at_extreme, groups, 0.0), 1) * -0.125
        one = tl.full((WIDTH // 32,), 1.0, tl.float32)
        inverse = tl.where(d == 0.0, 0.0, tl.div_rn(one, tl.where(d == 0.0, 1.0, d)))
        scaled = groups * inverse[:, None]
        tl.store(scales + position * GROUPS + g, d.to(tl.float16), mask=g < GROUPS)
        if FORMAT == 1:
            size = tl.abs(scaled)
            whole = tl.floor(size)
            rounded = whole + tl.floor(2.0 * (size - whole))  # halves away from zero
            q = tl.where(scaled < 0.0, -rounded, rounded).to(tl.int32) + 128
            tl.store(values + position * D + c, tl.reshape(q, (WIDTH,)).to(tl.uint8), mask=c < D)
        else:
            HALF: tl.constexpr = WIDTH // 2
            q = tl.reshape(tl.minimum((scaled + 8.5).to(tl.int32), 15), (2, HALF))
            both = tl.sum(q << (4 * tl.arange(0, 2))[:, None], 0)
            tl.store(values + position * HALF + tl.arange(0, HALF), both.to(tl.uint8))
