"""Attention of all rows of a pass in one launch: rows of any sequences, in both views.

What a row sees is data, not code. Row r sees the first `visible[r]` columns of its sequence, then
rows `block_first[r] .. block_stop[r]-1` of the pass's own key/value scratch. An AR row at position
p has its key in the cache already and sees p + 1 columns; a diffusion row sees the context of its
block and the block itself. An unused row sees nothing and gets zeros. Lengths thus live on the
device, and one CUDA graph serves them all.

Rows of one sequence that follow one another are a *run*. A table (`Tiles`) says which run a program
works on, so that no program reads keys of two sequences. A run may be a branch of a tree, whose
rows see the cache up to the column `edge` and from there on columns that lie `shift` further: where
each key lies is data, too, while the order in which keys are summed follows from the column alone.
In layers with a sliding window (`Sight`) what a row sees is cut further, by its position.

The rows x query heads of one kv head are packed into tiles of `tile` rows, so that keys are read
once for all of them. The cache is cut into chunks of CHUNK positions, dealt in turn to LANES
programs; each keeps one running softmax over its chunks, in ascending order. `_combine` then merges
the lanes in order, and the block last. Both constants are part of the arithmetic: which lane sums
which key depends on columns only, so a row's bits depend neither on the other rows, nor
on how many there are, nor on the capacity of the cache. (Only AR rows need that. A diffusion row
may depend on where its block lies in the scratch.) Prompts, whose bits may be their own, have rows
enough to keep a card busy: they take as many lanes as the same scratch then holds.

Why lanes rather than one part per chunk: parts cost LANES * rows * heads * (d + 2) floats of
scratch, and of traffic, whatever the context (18 MB for 64 rows of Qwen3-8B). One part per 512
positions would take 0.5 GB at a context of 256k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_kernels.attention.kv_cache import (
    FORMATS,
    Caches,
    KvPlanes,
    halves,
    load_halves,
    planes_of,
)
from orthrus_kernels.elementwise.activation_rows import (
    Int8Rows,
    row_pointers,
    row_strides,
    store_columns,
)
from orthrus_kernels.elementwise.ops import part_sizes, split_sum
from orthrus_kernels.elementwise.rows import Rows
from orthrus_kernels.overlap import begin, overlapped

CHUNK = 64
"""Positions that a lane takes at a time. Small, so that short contexts keep all lanes at work: from
1,024 keys down none walks more than two steps, one after the other, whose latency nothing hides."""
LANES = 16
PROMPT_WINDOW = 8
"""Rows of a prompt's window, per row that the scratch has all lanes for: LANES / 2 at most."""
KEYS = 32
"""Keys per step of the inner loop; divides CHUNK."""
STAGES = 2

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionScratch:
    """Running softmaxes between the two kernels, for up to `rows` rows at a time, or for more with
    fewer lanes.

    sums f32 [LANES + 1, kv heads, packed rows, head_dim]: softmax numerators.
    stats f32 [LANES + 1, kv heads, packed rows, 2]: running maximum (log2 units), denominator.
    """

    sums: Tensor
    stats: Tensor
    rows: int

    def lanes(self, rows: int) -> tuple[int, int]:
        """How many lanes a window of so many rows takes, and its packed rows."""
        packed = self.sums.shape[2]
        if rows <= self.rows:
            return LANES, packed
        wide = triton.cdiv(packed * rows, self.rows * 64) * 64
        return (LANES + 1) * packed // wide - 1, wide


def new_attention_scratch(
    rows: int, n_head: int, n_head_kv: int, head_dim: int, device: torch.device | str
) -> AttentionScratch:
    """Scratch for windows of `rows` rows, or of PROMPT_WINDOW times as many of a prompt."""
    packed = triton.cdiv(rows * (n_head // n_head_kv), 64) * 64
    shape = (LANES + 1, n_head_kv, packed)
    sums = torch.empty(*shape, head_dim, device=device)
    return AttentionScratch(sums, torch.empty(*shape, 2, device=device), rows)


def attention_tile(head_dim: int) -> tuple[int, int]:
    """Packed rows per tile, and warps: fixed, so that every pass runs the same compiled kernel.

    Smaller tiles for single rows would be a different program (their warps split the keys), so
    their bits could differ from those of a verify pass.
    """
    return (64, 4) if head_dim <= 128 else (32, 4)


TILE_SIZE = 6
"""Columns of the table of tiles."""

NO_EDGE = 2**31 - 1
"""The edge of a run that finds all its keys in place."""


@dataclass(frozen=True)
class Run:
    """Rows `first .. first + rows - 1` of a pass, of one sequence; edge, shift: see the module."""

    first: int
    rows: int
    sequence: int
    edge: int = NO_EDGE
    shift: int = 0


@dataclass(frozen=True)
class Tiles:
    """What the programs of a pass work on.

    table: i32 [tiles, TILE_SIZE]: first row and rows of a run, the first of its packed rows that
        this tile holds, sequence, edge, shift; no rows: an unused tile. Rows count from the
        window's first.
    windows: (first row, rows, first tile, tiles) of each launch.
    """

    table: Tensor
    windows: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Sight:
    """What the rows of blocks see in layers with a sliding window: their own position and those
    before it, `back` in all, at least as many as a block has; of their block those behind them as
    well, unless it is causal."""

    back: int
    causal: bool


def tile_entries(runs: Sequence[Run], group: int, head_dim: int) -> list[tuple[int, ...]]:
    """The table of the tiles of some runs. group: query heads per key/value head."""
    tile, _ = attention_tile(head_dim)
    return [
        (run.first, run.rows, packed, run.sequence, run.edge, run.shift)
        for run in runs
        for packed in range(0, run.rows * group, tile)
    ]


def attention(
    q: Tensor,
    caches: Caches,
    layer: int,
    block_keys: KvPlanes,
    block_values: KvPlanes,
    rows: Rows,
    tiles: Tiles,
    scratch: AttentionScratch,
    out: Tensor | Int8Rows,
    gates: Tensor | None = None,
    sight: Sight | None = None,
) -> None:
    """Softmax attention of every row, scaled by 1 / sqrt(head_dim).

    q: f16 [rows, n_head, head_dim], normed and rotated.
    caches: of the pass; the keys of this layer's AR rows are already written.
    block_keys, block_values: the pass's scratch, f16 planes by row, filled for diffusion rows.
    rows: `visible`, `block_first` and `block_stop` say what each sees.
    out: f16 rows of n_head * head_dim columns, or int8 rows (head_dim a multiple of 32).
    gates: f32 partials of gated queries, as `finish_qkv` reads them: a head's output is multiplied
    by the sigmoid of its gate.
    sight: of the layer; None where rows see all that `rows` says.
    """
    n_head, head_dim = q.shape[1:]
    group = n_head // caches.heads
    tile, warps = attention_tile(head_dim)
    low, high = halves(head_dim)
    for first, count, first_tile, n_tiles in tiles.windows:
        lanes, packed = scratch.lanes(count)
        _parts[(caches.heads, n_tiles, lanes + 1)](
            q[first:],
            tiles.table[first_tile:],
            caches.entries,
            *caches.pointers(),
            block_keys.values,
            block_values.values,
            rows.visible[first:],
            rows.block_first[first:],
            rows.block_stop[first:],
            rows.positions[first:],
            scratch.sums,
            scratch.stats,
            layer,
            block_keys.capacity,
            packed,
            lanes,
            0 if sight is None else sight.back,
            LOG2_E / head_dim**0.5,
            HEADS=caches.heads,
            GROUP=group,
            LOW=low,
            HIGH=high,
            TILE=tile,
            KEYS=KEYS,
            CHUNK=CHUNK,
            K_FORMAT=FORMATS[caches.type_k],
            V_FORMAT=FORMATS[caches.type_v],
            SLIDING=sight is not None,
            CAUSAL=sight is not None and sight.causal,
            num_warps=warps,
            num_stages=STAGES,
            enable_fp_fusion=False,
            **overlapped(),
        )
        _combine[(n_head, count)](
            scratch.sums,
            scratch.stats,
            rows.visible[first:],
            rows.block_first[first:],
            rows.block_stop[first:],
            *row_pointers(out, first),
            scratch.sums if gates is None else gates[:, first:],
            packed,
            lanes,
            *row_strides(out),
            *((0, 0) if gates is None else part_sizes(gates)),
            HEADS=caches.heads,
            GROUP=group,
            D=head_dim,
            WIDTH=triton.next_power_of_2(head_dim),
            CHUNK=CHUNK,
            INT8=isinstance(out, Int8Rows),
            GATE_SPLITS=0 if gates is None else gates.shape[0],
            num_warps=1,
            enable_fp_fusion=False,
            **overlapped(),
        )


@triton.jit
def _step(
    q_low,
    q_high,
    k_low,
    k_high,
    v_low,
    v_high,
    seen,
    scale,
    top,
    total,
    sum_low,
    sum_high,
):
    """One tile of keys into a running softmax; `seen` [rows, keys] says which keys count."""
    score = tl.dot(q_high, tl.trans(k_high), tl.dot(q_low, tl.trans(k_low))) * scale
    score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(score - new_top[:, None])
    total = total * shrink + tl.sum(p, 1)
    p = p.to(tl.float16)
    sum_low = tl.dot(p, v_low, sum_low * shrink[:, None])
    sum_high = tl.dot(p, v_high, sum_high * shrink[:, None])
    return new_top, total, sum_low, sum_high


# Not specialized on what varies between passes: they must all run one and the same compiled kernel.
@triton.jit(do_not_specialize=["layer", "block_capacity", "packed", "lanes", "back"])
def _parts(
    q,
    tiles,
    entries,
    k_values,
    k_scales,
    v_values,
    v_scales,
    block_k,
    block_v,
    visible,
    block_first,
    block_stop,
    positions,
    sums,
    stats,
    layer,
    block_capacity,
    packed,
    lanes,
    back,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    SLIDING: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Program (kv head, tile, lane): one lane's softmax; the last one is the block's."""
    begin()
    head = tl.program_id(0)
    lane = tl.program_id(2)
    at_tile = tiles + tl.program_id(1) * 6
    first_row = tl.load(at_tile)
    in_run = tl.load(at_tile + 2) + tl.arange(0, TILE)
    r = first_row * GROUP + in_run
    row = r // GROUP
    used = in_run < tl.load(at_tile + 1) * GROUP
    sees = tl.load(visible + row, mask=used, other=0)
    first = tl.load(block_first + row, mask=used, other=0)
    stop = tl.load(block_stop + row, mask=used, other=0)

    # The part of the cache that this program reads: all that any row of the tile may see.
    period = lanes * CHUNK
    end = tl.max(sees, 0)
    own = end % period - lane * CHUNK
    last = tl.minimum(tl.maximum(own, 0), CHUNK)
    tiles = (end // period) * (CHUNK // KEYS) + tl.cdiv(last, KEYS)
    block_begin = tl.min(tl.where(stop > first, first, 1 << 30), 0)
    block_end = tl.max(tl.where(stop > first, stop, 0), 0)
    is_block = lane == lanes
    tiles = tl.where(is_block, 0, tiles)
    if tl.where(is_block, block_end, tiles) == 0:
        return

    sequence = tl.load(at_tile + 3)
    edge = tl.load(at_tile + 4)
    shift = tl.load(at_tile + 5)
    k_values, k_scales, capacity = planes_of(entries, sequence, k_values, k_scales, 0, K_FORMAT)
    v_values, v_scales, _ = planes_of(entries, sequence, v_values, v_scales, 2, V_FORMAT)
    cache_base = (layer.to(tl.int64) * HEADS + head) * capacity

    D: tl.constexpr = LOW + HIGH
    low = tl.arange(0, LOW)[None, :]
    high = LOW + tl.arange(0, HIGH)[None, :]
    n = tl.arange(0, KEYS)
    at_q = q + (row * (HEADS * GROUP) + head * GROUP + r % GROUP).to(tl.int64)[:, None] * D
    q_low = tl.load(at_q + low, mask=used[:, None], other=0.0)
    q_high = tl.load(at_q + high, mask=used[:, None], other=0.0)
    # Finite, so that a row without keys gives 0 / 0 nowhere: exp2(-inf - top) is 0.
    top = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sum_low = tl.zeros((TILE, LOW), tl.float32)
    sum_high = tl.zeros((TILE, HIGH), tl.float32)

    begins = 0
    if SLIDING:
        position = tl.load(positions + row, mask=used, other=0)
        since = tl.maximum(position + 1 - back, 0)
        begins = tl.min(tl.where(used, since, 1 << 30), 0) // period * (CHUNK // KEYS)
    for t in range(begins, tiles):
        at = (t // (CHUNK // KEYS)) * period + lane * CHUNK + (t % (CHUNK // KEYS)) * KEYS
        column = at + n
        there = column < end
        place = column + tl.where(column >= edge, shift, 0)
        k_low, k_high = load_halves(
            k_values, k_scales, cache_base, place, there, KEYS, LOW, HIGH, K_FORMAT
        )
        v_low, v_high = load_halves(
            v_values, v_scales, cache_base, place, there, KEYS, LOW, HIGH, V_FORMAT
        )
        seen = column[None, :] < sees[:, None]
        if SLIDING:
            seen &= column[None, :] >= since[:, None]
        top, total, sum_low, sum_high = _step(
            q_low, q_high, k_low, k_high, v_low, v_high, seen, scale, top, total, sum_low, sum_high
        )
    for at in range(block_begin, tl.where(is_block, block_end, 0), KEYS):
        base = head.to(tl.int64) * block_capacity
        there = at + n < block_end
        k_low, k_high = load_halves(block_k, block_k, base, at + n, there, KEYS, LOW, HIGH, 0)
        v_low, v_high = load_halves(block_v, block_v, base, at + n, there, KEYS, LOW, HIGH, 0)
        j = (at + n)[None, :]
        seen = (j >= first[:, None]) & (j < stop[:, None])
        if CAUSAL:
            seen &= sees[:, None] + j - first[:, None] <= position[:, None]
        top, total, sum_low, sum_high = _step(
            q_low, q_high, k_low, k_high, v_low, v_high, seen, scale, top, total, sum_low, sum_high
        )

    o = (lane * HEADS + head).to(tl.int64) * packed + r
    at_sum = sums + o[:, None] * D
    tl.store(at_sum + low, sum_low, mask=used[:, None])
    tl.store(at_sum + high, sum_high, mask=used[:, None])
    tl.store(stats + o * 2, top, mask=used)
    tl.store(stats + o * 2 + 1, total, mask=used)


@triton.jit(do_not_specialize=["packed", "lanes", "part_rows"])
def _combine(
    sums,
    stats,
    visible,
    block_first,
    block_stop,
    out,
    scales,
    group_sums,
    gates,
    packed,
    lanes,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    part_rows,
    part_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    INT8: tl.constexpr,
    GATE_SPLITS: tl.constexpr,
):
    """Program (query head, row): merge the lanes that the row uses, in order, the block last."""
    begin()
    query_head = tl.program_id(0)
    row = tl.program_id(1)
    head = query_head // GROUP
    r = row * GROUP + query_head % GROUP
    d = tl.arange(0, WIDTH)
    used = tl.minimum(tl.cdiv(tl.load(visible + row), CHUNK), lanes)
    has_block = tl.load(block_stop + row) > tl.load(block_first + row)
    top = -1e30
    total = 0.0
    acc = tl.zeros((WIDTH,), tl.float32)
    for i in range(used + has_block.to(tl.int32)):
        lane = tl.where(i < used, i, lanes)
        o = (lane * HEADS + head).to(tl.int64) * packed + r
        part_top = tl.load(stats + o * 2)
        part_total = tl.load(stats + o * 2 + 1)
        part = tl.load(sums + o * D + d, mask=d < D, other=0.0)
        new_top = tl.maximum(top, part_top)
        old = tl.exp2(top - new_top)
        new = tl.exp2(part_top - new_top)
        acc = acc * old + part * new
        total = total * old + part_total * new
        top = new_top
    result = tl.where(total > 0.0, tl.div_rn(acc, tl.where(total > 0.0, total, 1.0)), 0.0)
    first = query_head * D
    if GATE_SPLITS > 0:
        at_gate = (2 * query_head + 1) * D + d
        gate = split_sum(gates, row, part_rows, part_stride, at_gate, d < D, GATE_SPLITS)
        result = tl.div_rn(result, 1.0 + tl.exp(-gate))
    store_columns(
        result,
        out,
        scales,
        group_sums,
        row,
        first,
        first + D,
        row_stride,
        group_stride,
        scale_row_stride,
        scale_group_stride,
        WIDTH,
        INT8,
    )
