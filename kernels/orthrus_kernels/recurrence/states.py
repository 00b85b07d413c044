"""What gated DeltaNet layers keep of a sequence on the device, and how kernels find it.

Per layer and value head a matrix S [key, value], f32. What a row does to it is kept beside it, in a
record, and the matrix stays as it was: records of rows that were accepted become part of it at the
beginning of the next pass, with the same instructions, and dropping the others costs nothing.

    memory   f32 [2 planes, layers, value heads, head_dim (key), head_dim (value)]
    records  f32 [layers, records, size of a record]:
               inputs of the convolution [channels], k [key heads * head_dim],
               delta [value heads * head_dim], decay [value heads, to whole 16s]
    stamps   i32 [layers, value heads, tiles of columns]

The second plane is for long runs, which advance the state: it is read from one plane and left in
the other, so that it can be dropped as well. A tile's stamp says which of the sequence's commits it
holds: so a pass may run again, or go on after it broke off, and no record is applied twice.

As with caches (`attention.kv_cache`), kernels get one fixed address and a table of distances from
it, so that a CUDA graph outlives the sequences that it serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus_kernels.attention.kv_cache import UNIT

BACK = 3
"""Rows that the convolution looks back on."""

COLUMNS = 8
"""Columns of S that a program takes through all rows of a run: 32 bytes, a sector, of each line."""

STATE_DIMS = (32, 64, 128)
"""Sizes of heads that kernels are made for."""

RUN = (
    "first",
    "rows",
    "sequence",
    "source",
    "target",
    "apply_first",
    "apply_stop",
    "stamp",
    "keeps",
)
"""Columns of `Runs.table`."""

ADVANCE, RECORD, DRAFT = 1, 0, -1
"""What a run keeps: the state behind its last row; records of its rows only; nothing, not even what
it applies."""

ROW = ("record", "back_1", "back_2", "back_3", "replay_first", "replay_stop")
"""Columns that the host fills for each row, see `Runs`."""


@dataclass(frozen=True)
class StateShape:
    """Sizes of the states of a model. layers: DeltaNet layers; records: of a sequence; value head h
    reads key head h mod key_heads."""

    layers: int
    key_heads: int
    value_heads: int
    head_dim: int
    records: int

    @property
    def channels(self) -> int:
        """What the convolution runs over: q, k and v."""
        return (2 * self.key_heads + self.value_heads) * self.head_dim

    @property
    def record(self) -> int:
        """Floats of a record."""
        changes = (self.key_heads + self.value_heads) * self.head_dim
        return self.channels + changes + -(-self.value_heads // 16) * 16


@dataclass(frozen=True)
class StateMemory:
    """What the layers keep of one sequence; see the module."""

    memory: Tensor
    records: Tensor
    stamps: Tensor


def new_state(shape: StateShape, device: torch.device | str) -> StateMemory:
    """Of a text that has not begun."""
    s = shape
    heads = (s.layers, s.value_heads)
    return StateMemory(
        torch.zeros(2, *heads, s.head_dim, s.head_dim, device=device),
        torch.zeros(s.layers, s.records, s.record, device=device),
        torch.zeros(*heads, s.head_dim // COLUMNS, dtype=torch.int32, device=device),
    )


STATE_ENTRY = 3
"""Columns of `States.entries`: offsets of memory, records and stamps."""


@dataclass(frozen=True)
class States:
    """The states that the rows of a pass may belong to.

    anchor: u8, what offsets are counted from. entries: i64 [sequences, STATE_ENTRY], see
    `state_entry`. held: what the entries stand for, for implementations in plain torch.
    """

    shape: StateShape
    anchor: Tensor
    entries: Tensor
    held: list[StateMemory]

    def pointers(self) -> tuple[Tensor, Tensor]:
        """The anchor as floats and as whole numbers."""
        return self.anchor.view(torch.float32), self.anchor.view(torch.int32)


def state_entry(state: StateMemory, anchor: Tensor) -> tuple[int, int, int]:
    """The row of `States.entries` for a sequence."""
    offsets = []
    for part in (state.memory, state.records, state.stamps):
        distance = part.data_ptr() - anchor.data_ptr()
        if distance % UNIT:
            raise ValueError(f"states lie {distance} bytes apart, not a multiple of {UNIT}")
        offsets.append(distance // UNIT)
    return offsets[0], offsets[1], offsets[2]


@dataclass(frozen=True)
class Runs:
    """What the recurrence does in a pass.

    A run is rows of one sequence that follow one another in the pass. table: i32 [runs, RUN]: first
    row, rows (0: an unused run, unless there is something to apply), sequence; plane that the state
    is read from, and the one that it is left in where it advances; the range of `slots` that holds
    records to apply first; the stamp of a state that has them; what is kept (ADVANCE: the state
    behind the last row, in a plane of its own).

    Runs that need what others of the same pass leave in records go into a launch behind theirs.

    Of each row, i32 [rows]: record, where it leaves what it does (-1: nowhere); back_1 to back_3,
    the rows before it, the nearest first: rows of the pass, or -1 - a record of its sequence;
    replay_first, replay_stop: the range of `slots` with the records that it begins from, behind the
    state of the run's beginning; replay_first -1: it follows the row before it.
    slots: i32, numbers of records.
    """

    table: Tensor
    record: Tensor
    back_1: Tensor
    back_2: Tensor
    back_3: Tensor
    replay_first: Tensor
    replay_stop: Tensor
    slots: Tensor
