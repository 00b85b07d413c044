"""What the host says about a pass: one buffer, one upload.

A pass is captured as a graph once per `Shape`, and replayed with other tables in the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from orthrus_kernels.attention.attention import TILE_SIZE, Tiles
from orthrus_kernels.attention.kv_cache import ENTRY
from orthrus_kernels.elementwise.rows import COLUMNS, UNUSED, Rows
from orthrus_kernels.recurrence.states import ROW, RUN, STATE_ENTRY, Runs
from orthrus_kernels.sampling.sample import NUMBERS, DrawKind, Draws
from torch import Tensor

from orthrus_gguf.runtime.cuda.device import Machine

#: Host buffers of a table: one is filled while the copy from the other may be under way.
SLOTS = 2

_ALIGNMENT = 16

Host = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    """Everything that the launches of a pass depend on: the key of its graph. Counts are rounded up
    to few sizes.

    ar, blocks: rows by view. wanted: rows that the head computes. tiles: of attention.
    kind: how the wanted rows are drawn; None leaves their logits.
    more, moves, windows, bans: sizes of tables, see `Rows`, `CudaCache` and `Draws`.
    taps: see `protocol.Segment`. runs, block_runs, slots: of the recurrence, see `states.Runs`; 0
    where there is none. steps: how often such rows run, each time with what the time before drew.
    """

    ar: int
    blocks: int
    wanted: int
    tiles: int
    kind: DrawKind | None
    more: int = 1
    moves: int = 0
    windows: int = 1
    bans: int = 1
    taps: tuple[int, ...] = ()
    runs: int = 0
    block_runs: int = 0
    slots: int = 0
    steps: int = 1

    @property
    def rows(self) -> int:
        return self.ar + self.blocks

    @property
    def columns(self) -> int:
        """Of the results of a wanted row."""
        return 0 if self.kind is None else self.kind.columns


def _fields(shape: Shape, n_vocab: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → numpy type and shape of every table."""
    rows, wanted = shape.rows, shape.wanted
    masked = shape.kind is not None and shape.kind.masked
    runs = shape.runs + shape.block_runs
    return {
        "entries": ("i8", (rows, ENTRY)),
        "numbers": ("f8", (wanted, NUMBERS)),
        "integers": ("i8", (wanted, 2)),
        "rows": ("i4", (len(COLUMNS), rows)),
        "more": ("i4", (shape.more,)),
        "moves": ("i4", (shape.moves, 3)),
        "tiles": ("i4", (shape.tiles, TILE_SIZE)),
        "index": ("i4", (wanted,)),
        "modes": ("i4", (wanted,)),
        "positions": ("i4", (wanted,)),
        "window_first": ("i4", (wanted,)),
        "window_stop": ("i4", (wanted,)),
        "windows": ("i4", (shape.windows,)),
        "bans": ("i4", (shape.bans, 2)),
        "states": ("i8", (rows if runs else 0, STATE_ENTRY)),
        "runs": ("i4", (runs, len(RUN))),
        "state_rows": ("i4", (len(ROW), rows if runs else 0)),
        "slots": ("i4", (shape.slots,)),
        "masks": ("i4", (wanted if masked else 0, -(-n_vocab // 32))),
    }


class Table:
    """What the launches of a pass find on the device.

    windows: launches of attention, see `attention.Tiles`. tensors: by the names of `_fields`.
    results: i32, for each wanted row `shape.columns` numbers, then the taps (f32 [taps, rows,
    n_embd]).
    """

    def __init__(
        self,
        shape: Shape,
        windows: tuple[tuple[int, int, int, int], ...],
        tensors: Mapping[str, Tensor],
        results: Tensor,
    ) -> None:
        self.shape, self.windows, self.tensors, self.results = shape, windows, tensors, results

    @property
    def drawn(self) -> Tensor:
        """Results of the wanted rows, i32 [wanted, columns]."""
        shape = self.shape
        return self.results[: shape.wanted * shape.columns].view(shape.wanted, shape.columns)

    def taps(self, n_embd: int) -> Tensor:
        """f32 [taps, rows, n_embd]."""
        shape = self.shape
        planes = self.results[shape.wanted * shape.columns :].view(torch.float32)
        return planes.view(len(shape.taps), shape.rows, n_embd)

    def rows(self, cos: Tensor, sin: Tensor) -> Rows:
        """cos, sin: room for the angles of all rows."""
        columns = dict(zip(COLUMNS, self.tensors["rows"], strict=True))
        count = self.shape.rows
        return Rows(**columns, more=self.tensors["more"], cos=cos[:count], sin=sin[:count])

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.tensors["tiles"], self.windows)

    @property
    def runs(self) -> tuple[Runs, ...]:
        """What the recurrence of a hybrid does, launch by launch: with AR rows, then with blocks,
        which may need what those leave in records."""
        t, shape = self.tensors, self.shape
        columns = dict(zip(ROW, t["state_rows"], strict=True))
        parts = t["runs"][: shape.runs], t["runs"][shape.runs :]
        return tuple(Runs(part, slots=t["slots"], **columns) for part in parts if len(part))

    @property
    def draws(self) -> Draws:
        names = (
            "modes", "positions", "numbers", "integers", "windows", "window_first", "window_stop",
            "bans", "masks",
        )  # fmt: skip
        return Draws(**{name: self.tensors[name] for name in names})


class StagedTable(Table):
    """The tables of the passes of one shape: filled by the host, uploaded in one piece.

    steps: what each step of the pass finds; the first finds what the table itself is.
    """

    def __init__(
        self,
        shape: Shape,
        n_vocab: int,
        n_embd: int,
        windows: tuple[tuple[int, int, int, int], ...],
        machine: Machine,
    ) -> None:
        self._machine = machine
        fields = _fields(shape, n_vocab)
        offsets, size = {}, 0
        for name, (code, dims) in fields.items():
            offsets[name] = size
            size += -(-prod(dims) * np.dtype(code).itemsize // _ALIGNMENT) * _ALIGNMENT

        def views(buffer: Tensor) -> list[dict[str, Tensor]]:
            """Of each step."""
            return [
                {name: _view(part, offsets[name], *field) for name, field in fields.items()}
                for part in buffer.view(shape.steps, size)
            ]

        self._buffer = torch.empty(shape.steps * size, dtype=torch.uint8, device=machine.device)
        self._slots = [machine.host_buffer(shape.steps * size) for _ in range(SLOTS)]
        self._hosts: list[list[Host]] = [
            [{name: view.numpy() for name, view in step.items()} for step in views(slot)]
            for slot in self._slots
        ]
        self._copied = [machine.new_event() for _ in range(SLOTS)]
        self._slot = 0
        count = shape.wanted * shape.columns + len(shape.taps) * shape.rows * n_embd
        self._results = torch.empty(shape.steps * count, dtype=torch.int32, device=machine.device)
        self._received = machine.host_buffer(4 * self._results.numel()).view(torch.int32)
        self.steps = [
            Table(shape, windows, tensors, self._results[step * count : (step + 1) * count])
            for step, tensors in enumerate(views(self._buffer))
        ]
        super().__init__(shape, windows, self.steps[0].tensors, self.steps[0].results)

    def begin(self) -> Host:
        """Host tables of the next pass, in which nothing is used yet: those of its first step."""
        self._slot = (self._slot + 1) % SLOTS
        self._machine.wait(self._copied[self._slot])  # two passes ago: long since copied
        self._slots[self._slot].zero_()
        for host in self.hosts:
            for name in ("moves", "modes", "bans", "masks"):
                host[name].fill(-1)
            host["rows"][0].fill(UNUSED)
        return self.host

    @property
    def hosts(self) -> list[Host]:
        """Host tables of the pass that was begun last, step by step."""
        return self._hosts[self._slot]

    @property
    def host(self) -> Host:
        """Those of its first step."""
        return self.hosts[0]

    def upload(self) -> None:
        """Enqueue the copy of the host tables."""
        self._buffer.copy_(self._slots[self._slot], non_blocking=True)
        self._machine.record(self._copied[self._slot])

    def download(self) -> NDArray[np.int32]:
        """Wait for the results of all steps; the next pass of this shape overwrites them."""
        return self._machine.download(self._results, self._received)


_TYPES: Mapping[str, torch.dtype] = {"i4": torch.int32, "i8": torch.int64, "f8": torch.float64}


def _view(buffer: Tensor, offset: int, code: str, dims: tuple[int, ...]) -> Tensor:
    """Part of a buffer as a tensor."""
    size = prod(dims) * np.dtype(code).itemsize
    return buffer[offset : offset + size].view(_TYPES[code]).view(dims)
