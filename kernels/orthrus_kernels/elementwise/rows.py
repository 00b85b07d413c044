"""The rows of one pass, laid out on the device from a segment table and the decoding state.

A pass is captured once as a CUDA graph and replayed at any length, so nothing that depends on the
length may come from the host. The host fixes the shape of the pass (the segment table); this kernel
adds what the state knows: tokens, positions, what each row sees, and its rotary angles, once per
pass rather than once per layer.

`history` holds the tokens by position: committed up to the anchor, then the drafts to verify. AR
rows read their tokens there. So does the first row of a diffusion block, unless its segment names
one of the `alternatives` instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

UNUSED, AR, DIFFUSION = -1, 0, 1
"""Views of a row; UNUSED rows fill up the bucket."""

POSITION, EMITTED, LIMIT, STATUS, CYCLES = range(5)
STATE_SIZE = 8
"""The decoding state, i32 [STATE_SIZE]: position of the anchor (equally the rows of the cache that
count), tokens committed so far, how many may be committed at most, why decoding stopped, cycles."""

RUNNING, STOPPED, BAD_LOGITS = 0, 1, 2
"""Values of state[STATUS]: going on (or at its limit), a stop token came, no finite logits."""

SEGMENT_SIZE = 5
"""Columns of the segment table, i32 [segments, 5]: view, first row, rows, position of the first row
minus the anchor's, index of the first token in `alternatives` (-1: take it from the history)."""


@dataclass(frozen=True)
class Rows:
    """What the kernels know about the rows of a pass; all i32 [rows] but the angles.

    positions: of the row itself; the token drawn from its logits belongs one further.
    visible: cache rows it sees; block_first, block_stop: rows of the pass that its block covers.
    cos, sin: f32 [rows, head_dim/2], scaled as YaRN asks.
    """

    views: Tensor
    tokens: Tensor
    positions: Tensor
    visible: Tensor
    block_first: Tensor
    block_stop: Tensor
    cos: Tensor
    sin: Tensor


def new_rows(rows: int, head_dim: int, device: torch.device | str) -> Rows:
    """Uninitialised rows for `plan_rows` to fill."""
    whole = [torch.empty(rows, dtype=torch.int32, device=device) for _ in range(6)]
    angles = [torch.empty(rows, head_dim // 2, device=device) for _ in range(2)]
    return Rows(*whole, *angles)


def plan_rows(
    state: Tensor,
    history: Tensor,
    segments: Tensor,
    alternatives: Tensor,
    mask_token: int,
    capacity: int,
    inv_freq: Tensor,
    rope_scale: float,
    rows: Rows,
) -> None:
    """Fill `rows` for the pass that `segments` describes, at the place where `state` stands.

    history: i32, tokens by position. alternatives: i32, at least one element.
    capacity: of the cache; AR rows that do not fit become unused.
    inv_freq: f64 [head_dim/2], radians per position of each pair (scaled, for YaRN).
    Angles are reduced in double precision, good to the rounding of f32 below position 2^20.
    """
    count, half = rows.cos.shape
    _plan[(count,)](
        state,
        history,
        segments,
        alternatives,
        inv_freq,
        rows.views,
        rows.tokens,
        rows.positions,
        rows.visible,
        rows.block_first,
        rows.block_stop,
        rows.cos,
        rows.sin,
        segments.shape[0],
        mask_token,
        capacity,
        rope_scale,
        HALF=half,
        WIDTH=triton.next_power_of_2(half),
        num_warps=1,
        enable_fp_fusion=False,
    )


@triton.jit
def _plan(
    state,
    history,
    segments,
    alternatives,
    inv_freq,
    views,
    tokens,
    positions,
    visible,
    block_first,
    block_stop,
    cos,
    sin,
    n_segments,
    mask_token,
    capacity,
    rope_scale,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    anchor = tl.load(state)  # POSITION
    view = -1
    first = 0
    count = 0
    start = 0
    alternative = -1
    for i in range(n_segments):
        at = segments + i * 5
        its_first = tl.load(at + 1)
        its_count = tl.load(at + 2)
        mine = (row >= its_first) & (row < its_first + its_count)
        view = tl.where(mine, tl.load(at), view)
        first = tl.where(mine, its_first, first)
        count = tl.where(mine, its_count, count)
        start = tl.where(mine, anchor + tl.load(at + 3), start)
        alternative = tl.where(mine, tl.load(at + 4), alternative)
    position = start + row - first
    is_ar = (view == 0) & (position < capacity)
    is_block = view == 1
    used = is_ar | is_block
    position = tl.where(used, position, 0)

    guessed = is_block & (alternative >= 0)
    from_history = is_ar | (is_block & (row == first) & (alternative < 0))
    known = tl.load(history + position, mask=from_history, other=0)
    guess = tl.load(alternatives + alternative, mask=guessed, other=0)
    head = tl.where(guessed, guess, known)
    token = tl.where(is_block & (row > first), mask_token, tl.where(used, head, 0))
    tl.store(views + row, tl.where(used, view, -1))
    tl.store(tokens + row, token)
    tl.store(positions + row, position)
    sees = tl.where(is_ar, position + 1, tl.minimum(start, capacity))
    tl.store(visible + row, tl.where(used, sees, 0))
    tl.store(block_first + row, tl.where(is_block, first, 0))
    tl.store(block_stop + row, tl.where(is_block, first + count, 0))

    c = tl.arange(0, WIDTH)
    radians = tl.load(inv_freq + c, mask=c < HALF, other=0.0) * position.to(tl.float64)
    x, y = _cos_sin(radians, WIDTH)
    tl.store(cos + row * HALF + c, (x * rope_scale).to(tl.float32), mask=c < HALF)
    tl.store(sin + row * HALF + c, (y * rope_scale).to(tl.float32), mask=c < HALF)


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
