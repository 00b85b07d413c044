"""The rows of one pass: what the host says about each of them, and their rotary angles.

Everything that varies from pass to pass comes from the host in one upload; a pass is captured once
as a CUDA graph and replayed for any positions and lengths. Only the angles are made on the device,
once per pass rather than once per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

UNUSED, AR, DIFFUSION = -1, 0, 1
"""Views of a row; UNUSED rows fill up the bucket."""

COLUMNS = (
    "views",
    "tokens",
    "positions",
    "visible",
    "block_first",
    "block_stop",
    "sequences",
    "places",
    "more_first",
    "more_stop",
)
"""Fields of `Rows` that the host fills, each i32 [rows]."""


@dataclass(frozen=True)
class Rows:
    """What the kernels know about the rows of a pass; all i32 [rows] but the last three.

    positions: of the row itself; the token drawn from its logits belongs one further.
    visible: columns of the sequence that it sees; block_first, block_stop: rows of the pass that
        its block covers.
    sequences: the entry of `kv_cache.Caches` that it belongs to.
    places: where in that cache an AR row's keys go; more_first, more_stop: the range of `more` that
        holds further places, for rows that several branches of a tree share.
    more: i32, any number.
    cos, sin: f32 [rows, head_dim/2], scaled as YaRN asks.
    """

    views: Tensor
    tokens: Tensor
    positions: Tensor
    visible: Tensor
    block_first: Tensor
    block_stop: Tensor
    sequences: Tensor
    places: Tensor
    more_first: Tensor
    more_stop: Tensor
    more: Tensor
    cos: Tensor
    sin: Tensor


def new_angles(rows: int, head_dim: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Uninitialised cosines and sines for `rotary_angles` to fill."""
    cos, sin = (torch.empty(rows, head_dim // 2, device=device) for _ in range(2))
    return cos, sin


def rotary_angles(rows: Rows, inv_freq: Tensor, scale: float) -> None:
    """Fill `cos` and `sin` for the rows' positions.

    inv_freq: f64 [head_dim/2], radians per position of each pair; scale: factor on both (YaRN).
    Angles are reduced in double precision, good to the rounding of f32 below position 2^20.
    """
    count, half = rows.cos.shape
    _angles[(count,)](
        rows.positions,
        inv_freq,
        rows.cos,
        rows.sin,
        scale,
        HALF=half,
        WIDTH=triton.next_power_of_2(half),
        num_warps=1,
        enable_fp_fusion=False,
    )


@triton.jit
def _angles(positions, inv_freq, cos, sin, scale, HALF: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, WIDTH)
    position = tl.load(positions + row).to(tl.float64)
    radians = tl.load(inv_freq + c, mask=c < HALF, other=0.0) * position
    x, y = _cos_sin(radians, WIDTH)
    tl.store(cos + row * HALF + c, (x * scale).to(tl.float32), mask=c < HALF)
    tl.store(sin + row * HALF + c, (y * scale).to(tl.float32), mask=c < HALF)


@triton.jit
def _cos_sin(radians, WIDTH: tl.constexpr):
    """Cosine and sine of f64 angles of up to 2^20 radians, to 1e-12.

    Our own series instead of libdevice's, whose argument reduction keeps a table on the stack.
    """
    quarter = tl.floor(radians * 0.6366197723675814 + 0.5)  # 2 / pi
    # pi/2 in two parts; the first has 33 bits, so that its product with `quarter` is exact.
    x = radians - quarter * 1.5707963267341256 - quarter * 6.077100506506192e-11
    z = x * x
    s = 1.0 - z * (1.0 / 110.0) * (1.0 - z * (1.0 / 156.0))
    s = 1.0 - z * (1.0 / 20.0) * (1.0 - z * (1.0 / 42.0) * (1.0 - z * (1.0 / 72.0) * s))
    s = x * (1.0 - z * (1.0 / 6.0) * s)
    c = 1.0 - z * (1.0 / 90.0) * (1.0 - z * (1.0 / 132.0) * (1.0 - z * (1.0 / 182.0)))
    c = 1.0 - z * (1.0 / 12.0) * (1.0 - z * (1.0 / 30.0) * (1.0 - z * (1.0 / 56.0) * c))
    c = 1.0 - z * 0.5 * c
    turn = quarter.to(tl.int64) & 3
    odd = (turn & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where((turn == 1) | (turn == 2), -cosine, cosine)
    sine = tl.where(turn >= 2, -sine, sine)
    return cosine, sine
