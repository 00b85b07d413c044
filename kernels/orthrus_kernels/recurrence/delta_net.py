"""Gated DeltaNet: a causal convolution, a recurrence over the rows of a sequence, a gated norm.

Per value head h a state S [key i, value j] changes row by row:

    delta = beta (v - decay S^T k)      S <- decay S + k delta^T      o = S^T q

The columns j do not meet: a program takes COLUMNS of them through all rows of a run, in registers,
and reads and writes the state once. The order of a sum over i is that of the compiled kernel, which
is the same for any number of rows: so a row's bits depend on the rows before it and on nothing
else. Records (`states.py`) are applied by the instructions that made them.

Inputs are the split-K partials of one or two products, as everywhere (`elementwise.ops`): q | k | v
| gate, then alpha | beta.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from orthrus_kernels.elementwise.activation_rows import (
    Int8Rows,
    row_pointers,
    row_strides,
    store_columns,
)
from orthrus_kernels.elementwise.ops import part_sizes, split_sum
from orthrus_kernels.elementwise.rows import Rows
from orthrus_kernels.recurrence.states import COLUMNS, RUN, Runs, States

L2_EPS = tl.constexpr(1e-6)
"""What the squared length of q and k is raised by."""


def convolve(
    inputs: Tensor,
    gates: Tensor,
    taps: Tensor,
    a: Tensor,
    dt: Tensor,
    rows: Rows,
    runs: Runs,
    states: States,
    layer: int,
    mixed: Tensor,
    strengths: Tensor,
) -> None:
    """The convolution of all rows, and what the recurrence needs beside; records of the rows
    that have one, but for their delta.

    inputs: f32 partials [splits, rows, at least channels], q | k | v. gates: f32 partials [splits,
    rows, 2 value heads], alpha | beta. taps: f32 [views, channels, 4]. a, dt: f32 [views, value
    heads]. A row has those of its view.
    mixed: f32 [rows, channels], q and k of length 1 / sqrt(head_dim) and 1. strengths: f32 [rows, 2
    value heads], decay | beta.
    """
    s = states.shape
    _convolve[(inputs.shape[1], 2 * s.key_heads + s.value_heads + 1)](
        inputs,
        gates,
        taps,
        a,
        dt,
        rows.views,
        rows.sequences,
        runs.record,
        runs.back_1,
        runs.back_2,
        runs.back_3,
        states.entries,
        states.pointers()[0],
        mixed,
        strengths,
        *part_sizes(inputs),
        *part_sizes(gates),
        layer,
        SPLITS=inputs.shape[0],
        GATE_SPLITS=gates.shape[0],
        KEYS=s.key_heads,
        VALUES=s.value_heads,
        WIDTH=triton.next_power_of_2(s.value_heads),
        D=s.head_dim,
        RECORDS=s.records,
        SIZE=s.record,
        num_warps=1,
        enable_fp_fusion=False,
    )


def recur(
    mixed: Tensor, strengths: Tensor, runs: Runs, states: States, layer: int, out: Tensor
) -> None:
    """Runs through the recurrence of a layer, none of which needs what another one leaves.

    mixed, strengths: see `convolve`. out: f32 [rows, value heads * head_dim], written for the rows
    of runs.
    """
    s = states.shape
    _recur[(runs.table.shape[0], s.value_heads, s.head_dim // COLUMNS)](
        mixed,
        strengths,
        runs.table,
        runs.record,
        runs.replay_first,
        runs.replay_stop,
        runs.slots,
        states.entries,
        *states.pointers(),
        out,
        layer,
        s.layers,
        KEYS=s.key_heads,
        VALUES=s.value_heads,
        D=s.head_dim,
        COLUMNS=COLUMNS,
        RECORDS=s.records,
        SIZE=s.record,
        RUN=len(RUN),
        num_warps=1,
        enable_fp_fusion=False,
    )


def gated_norm(
    x: Tensor,
    inputs: Tensor,
    first: int,
    weight: Tensor,
    eps: float,
    rows: Rows,
    out: Tensor | Int8Rows,
) -> None:
    """out = RMSNorm of each head * weight * silu(gate).

    x: f32 [rows, heads * head_dim]. inputs: f32 partials whose columns from `first` on are the
    gates. weight: f32 [views, head_dim]. out: f16 rows, or int8 rows (head_dim a multiple of 32).
    """
    count, n = x.shape
    size = weight.shape[1]
    _gated_norm[(count, n // size)](
        x,
        inputs[..., first:],
        weight,
        rows.views,
        *row_pointers(out),
        *part_sizes(inputs),
        *row_strides(out),
        eps,
        SPLITS=inputs.shape[0],
        N=n,
        D=size,
        INT8=isinstance(out, Int8Rows),
        num_warps=1,
        enable_fp_fusion=False,
    )


@triton.jit
def _before(
    inputs, records, back, row, part_rows, part_stride, c, SPLITS: tl.constexpr, SIZE: tl.constexpr
):
    """Columns of a row before this one, of the pass or from a record."""
    at = tl.load(back + row)
    if at >= 0:
        x = split_sum(inputs, at, part_rows, part_stride, c, c >= 0, SPLITS)
    else:
        x = tl.load(records + (-1 - at).to(tl.int64) * SIZE + c)
    return x


@triton.jit(do_not_specialize=["part_rows", "gate_rows", "layer"])
def _convolve(
    inputs,
    gates,
    taps,
    a,
    dt,
    views,
    sequences,
    record,
    back_1,
    back_2,
    back_3,
    entries,
    memory,
    mixed,
    strengths,
    part_rows,
    part_stride,
    gate_rows,
    gate_stride,
    layer,
    SPLITS: tl.constexpr,
    GATE_SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    RECORDS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Program (row, head of q | k | v; the last one: decay and beta)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    view = tl.load(views + row)
    if view < 0:
        return
    HEADS: tl.constexpr = 2 * KEYS + VALUES
    taps += view * (HEADS * D * 4)
    a += view * VALUES
    dt += view * VALUES
    at_entry = entries + tl.load(sequences + row).to(tl.int64) * 3
    records = memory + tl.load(at_entry + 1) * 4 + layer.to(tl.int64) * (RECORDS * SIZE)
    slot = tl.load(record + row)
    own = records + slot.to(tl.int64) * SIZE
    if head < HEADS:
        c = head * D + tl.arange(0, D)
        x = split_sum(inputs, row, part_rows, part_stride, c, c >= 0, SPLITS)
        x_1 = _before(inputs, records, back_1, row, part_rows, part_stride, c, SPLITS, SIZE)
        x_2 = _before(inputs, records, back_2, row, part_rows, part_stride, c, SPLITS, SIZE)
        x_3 = _before(inputs, records, back_3, row, part_rows, part_stride, c, SPLITS, SIZE)
        total = x_3 * tl.load(taps + c * 4)
        total = tl.fma(x_2, tl.load(taps + c * 4 + 1), total)
        total = tl.fma(x_1, tl.load(taps + c * 4 + 2), total)
        total = tl.fma(x, tl.load(taps + c * 4 + 3), total)
        y = tl.div_rn(total, 1.0 + tl.exp(-total))
        if head < 2 * KEYS:
            length = tl.sqrt_rn(tl.sum(y * y, 0) + L2_EPS)
            y = y * tl.div_rn(tl.where(head < KEYS, D**-0.5, 1.0), length)
        tl.store(mixed + row.to(tl.int64) * (HEADS * D) + c, y)
        if slot >= 0:
            tl.store(own + c, x)
            if (head >= KEYS) & (head < 2 * KEYS):
                tl.store(own + (HEADS - KEYS) * D + c, y)
    else:
        h = tl.arange(0, WIDTH)
        there = h < VALUES
        alpha = split_sum(gates, row, gate_rows, gate_stride, h, there, GATE_SPLITS)
        beta = split_sum(gates, row, gate_rows, gate_stride, VALUES + h, there, GATE_SPLITS)
        step = alpha + tl.load(dt + h, mask=there, other=0.0)
        step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
        decay = tl.exp(tl.load(a + h, mask=there, other=0.0) * step)
        one = tl.full((WIDTH,), 1.0, tl.float32)
        at = strengths + row.to(tl.int64) * (2 * VALUES) + h
        tl.store(at, decay, mask=there)
        tl.store(at + VALUES, tl.div_rn(one, 1.0 + tl.exp(-beta)), mask=there)
        if slot >= 0:
            tl.store(own + (HEADS + KEYS + VALUES) * D + h, decay, mask=there)


@triton.jit
def _learned(tile, decay, k, delta, D: tl.constexpr, COLUMNS: tl.constexpr):
    """The one place where a state changes."""
    by = tl.broadcast_to(k[:, None], (D, COLUMNS))
    change = tl.broadcast_to(delta[None, :], (D, COLUMNS))
    return tl.fma(by, change, tile * decay)


@triton.jit
def _replayed(
    tile,
    records,
    slots,
    first,
    stop,
    head,
    key,
    i,
    j,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """What some records do to a tile."""
    CHANNELS: tl.constexpr = (2 * KEYS + VALUES) * D
    for at in range(first, stop):
        own = records + tl.load(slots + at).to(tl.int64) * SIZE + CHANNELS
        decay = tl.load(own + (KEYS + VALUES) * D + head)
        k = tl.load(own + key * D + i)
        delta = tl.load(own + (KEYS + head) * D + j)
        tile = _learned(tile, decay, k, delta, D, COLUMNS)
    return tile


@triton.jit(do_not_specialize=["layer", "layers"])
def _recur(
    mixed,
    strengths,
    table,
    record,
    replay_first,
    replay_stop,
    slots,
    entries,
    memory,
    stamps,
    out,
    layer,
    layers,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    RECORDS: tl.constexpr,
    SIZE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Program (run, value head, tile of columns)."""
    head = tl.program_id(1)
    number = tl.program_id(2)
    run = table + tl.program_id(0) * RUN
    first = tl.load(run)
    count = tl.load(run + 1)
    apply_first = tl.load(run + 5)
    apply_stop = tl.load(run + 6)
    if count + apply_stop - apply_first == 0:
        return
    CHANNELS: tl.constexpr = (2 * KEYS + VALUES) * D
    key = head % KEYS
    i = tl.arange(0, D)
    j = number * COLUMNS + tl.arange(0, COLUMNS)
    at_entry = entries + tl.load(run + 2).to(tl.int64) * 3
    records = memory + tl.load(at_entry + 1) * 4 + layer.to(tl.int64) * (RECORDS * SIZE)
    of_layer = layer.to(tl.int64) * VALUES + head
    at_stamp = stamps + tl.load(at_entry + 2) * 4 + of_layer * (D // COLUMNS) + number
    plane = layers.to(tl.int64) * (VALUES * D * D)
    within = memory + tl.load(at_entry) * 4 + of_layer * (D * D) + i[:, None] * D + j[None, :]
    at_source = within + tl.load(run + 3) * plane
    begun = tl.load(at_source)
    stamp = tl.load(run + 7)
    if (apply_stop > apply_first) & (tl.load(at_stamp) != stamp):
        begun = _replayed(
            begun, records, slots, apply_first, apply_stop, head, key, i, j,
            KEYS, VALUES, D, COLUMNS, SIZE,
        )  # fmt: skip
        if tl.load(run + 8) >= 0:
            tl.store(at_source, begun)
            tl.store(at_stamp, stamp)

    tile = begun
    for n in range(count):
        row = first.to(tl.int64) + n
        replays = tl.load(replay_first + row)
        if replays >= 0:
            tl.debug_barrier()  # deltas of this very pass are among the records
            tile = _replayed(
                begun, records, slots, replays, tl.load(replay_stop + row), head, key, i, j,
                KEYS, VALUES, D, COLUMNS, SIZE,
            )  # fmt: skip
        at_row = mixed + row * CHANNELS
        q = tl.load(at_row + key * D + i)
        k = tl.load(at_row + (KEYS + key) * D + i)
        v = tl.load(at_row + (2 * KEYS + head) * D + j)
        at_strength = strengths + row * (2 * VALUES) + head
        decay = tl.load(at_strength)
        beta = tl.load(at_strength + VALUES)
        known = tl.sum(tile * k[:, None], 0)
        delta = beta * (v - decay * known)
        tile = _learned(tile, decay, k, delta, D, COLUMNS)
        tl.store(out + (row * VALUES + head) * D + j, tl.sum(tile * q[:, None], 0))
        slot = tl.load(record + row)
        if slot >= 0:
            own = records + slot.to(tl.int64) * SIZE + CHANNELS
            tl.store(own + (KEYS + head) * D + j, delta)
    if tl.load(run + 8) > 0:  # loaded again: no register is left to keep it in
        tl.store(within + tl.load(run + 4) * plane, tile)


@triton.jit(do_not_specialize=["part_rows"])
def _gated_norm(
    x,
    gates,
    weight,
    views,
    out,
    scales,
    sums,
    part_rows,
    part_stride,
    row_stride,
    group_stride,
    scale_row_stride,
    scale_group_stride,
    eps,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    INT8: tl.constexpr,
):
    """Program (row, head)."""
    row = tl.program_id(0)
    first = tl.program_id(1) * D
    c = tl.arange(0, D)
    y = tl.load(x + row.to(tl.int64) * N + first + c)
    gate = split_sum(gates, row, part_rows, part_stride, first + c, c >= 0, SPLITS)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(y * y, 0) / D + eps))
    weight += tl.maximum(tl.load(views + row), 0) * D  # unused rows have none
    y = y * inverse * tl.load(weight + c) * tl.div_rn(gate, 1.0 + tl.exp(-gate))
    store_columns(
        y,
        out,
        scales,
        sums,
        row,
        first,
        N,
        row_stride,
        group_stride,
        scale_row_stride,
        scale_group_stride,
        D,
        INT8,
    )
