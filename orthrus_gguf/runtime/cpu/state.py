"""Keys, values and state of one sequence of a hybrid, as the native kernels read them (`delta.c`).

The state lags behind: rows of a pass are kept beside it, as records, and become part of it at the
beginning of the pass after they were accepted. Rejected ones cost nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from orthrus_cpu_kernels import library as k
from orthrus_cpu_kernels.library import LANES, Kernels, Step

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.hybrid import Hybrid
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.cache_layout import CacheLayout
from orthrus_gguf.runtime.checkpoints import Checkpoints
from orthrus_gguf.runtime.cpu.cache import CpuCache
from orthrus_gguf.runtime.limits import private_memory
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.recurrent import BACK, Ints, Records, Returning, RunPlan, record_count
from orthrus_gguf.runtime.trees import TreeLayout

#: Pending rows of which any may be dropped. Drafts are shorter.
PENDING_ROWS = 32

RECORDS = record_count(PENDING_ROWS)


@dataclass(frozen=True)
class StateLayout:
    """Sizes of the state of a sequence, in floats.

    n_layers: DeltaNet layers. memory: of the recurrence, per layer. record: of a row, per layer.
    """

    hybrid: Hybrid
    n_layers: int

    @classmethod
    def of(cls, config: ModelConfig) -> StateLayout:
        """Of the sequences of a hybrid."""
        assert config.hybrid is not None
        return cls(config.hybrid, config.layer_kinds.count(LayerKind.DELTA_NET))

    @property
    def memory(self) -> int:
        return self.hybrid.inner * self.hybrid.head_dim

    @property
    def record(self) -> int:
        h = self.hybrid
        changes = (h.n_key_heads + h.n_value_heads) * h.head_dim
        return h.channels + changes + -(-h.n_value_heads // LANES) * LANES

    @property
    def floats(self) -> int:
        """Of a sequence: its state, the one before a long segment, records."""
        return self.n_layers * (2 * self.memory + RECORDS * self.record)

    @property
    def kept_bytes(self) -> int:
        """Bytes of a checkpoint."""
        return 4 * self.n_layers * (self.memory + BACK * self.hybrid.channels)


@dataclass(frozen=True)
class State:
    """What DeltaNet layers know of a text. memory: [layers, floats]. rows: [layers, BACK,
    channels], what the convolution looks back on, the newest row last."""

    memory: NDArray[np.float32]
    rows: NDArray[np.float32]

    @property
    def parts(self) -> list[NDArray[np.uint8]]:
        """Views of all bytes."""
        return [part.reshape(-1).view(np.uint8) for part in (self.memory, self.rows)]


class HybridCpuCache(Returning[State], CpuCache):
    """See `protocol.Cache`.

    A state cannot be turned back. Of up to PENDING_ROWS pending rows, any may be dropped. Longer
    chains, which are prompts, change the state at once, and the one before them is kept aside: all
    of their rows are committed, or none. Else the cache goes back to checkpoints only.

    states: the kernels' view, one record per DeltaNet layer.
    """

    def __init__(
        self, layout: CacheLayout, capacity: int, spare: int, state: StateLayout, kernels: Kernels
    ) -> None:
        """See `CpuCache`. Raises OrthrusError if it cannot fit."""
        super().__init__(layout, capacity, spare)
        self._layout, self._kernels = state, kernels
        try:  # committed page by page, as records and the second state are used
            block = np.frombuffer(private_memory(4 * state.floats), np.float32)
        except OSError as error:
            raise OrthrusError(
                f"a state of {4 * state.floats / 2**20:.0f} MiB cannot be allocated; use fewer"
                " sequences at once"
            ) from error
        memory = state.n_layers * state.memory
        self.memory = block[:memory].reshape(state.n_layers, -1)
        self.saved = block[memory : 2 * memory].reshape(state.n_layers, -1)
        self.records = block[2 * memory :].reshape(state.n_layers, RECORDS, -1)
        self.states = np.zeros(state.n_layers, k.LAYER_STATE)
        for name in ("memory", "saved", "records"):
            array = getattr(self, name)
            self.states[name] = array.ctypes.data + np.arange(state.n_layers) * array.strides[0]
        self._book = Records(PENDING_ROWS)
        self._plan: RunPlan | None = None  # of the AR rows of the pass that runs next
        self._kept = Checkpoints[State](state.kept_bytes)

    # --- passes ---

    def plan(
        self, piece: Piece, first: int, rows: NDArray[np.void], run: NDArray[np.void]
    ) -> list[Ints]:
        """Describe a piece of an AR segment to the kernels: `library.STATE_ROW` records of its
        rows, and one `library.RUN`, which say already which rows of which sequence they are about.
        What they point to is returned, to be kept for the pass.

        first: the pass's row that the piece begins with.
        """
        self._plan = self._book.plan(piece)
        return _describe(self._plan, first, rows, run)

    def plan_block(
        self,
        start: int,
        first: int,
        rows: NDArray[np.void],
        run: NDArray[np.void],
        *,
        alone: bool,
    ) -> list[Ints]:
        """Describe a block behind the first `start` rows, as `plan` does. It begins from the state
        of those, which it leaves as it is.

        alone: no AR rows of this sequence share the pass; else those are planned, and run before
        the block does. Raises ValueError where the state before `start` is not at hand.
        """
        shared = None if alone else self._plan
        plan = self._book.plan_block(start, self._length, len(rows), shared)
        # What is applied to the state would stay there.
        plan = replace(plan, apply=[], replays={0: [*plan.apply, *plan.replays[0]]})
        return _describe(plan, first, rows, run)

    def ran(self) -> None:
        """The pass that was planned has run."""
        assert self._plan is not None
        self._book.ran(self._plan)

    def drop(self) -> None:
        """See `HostCache.drop`."""
        CpuCache.drop(self)
        if self._book.ahead is not None:
            self.memory[...] = self.saved
        self._book.drop()

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache.commit`."""
        pending = self._pending[0] if self._pending else 0
        self._book.check(rows, pending)
        super().commit(rows)
        if rows:
            self._book.commit(rows, pending)
        self.drop()
        if self._kept.due(self._length):
            self._keep()

    def fit(self, parents: Sequence[int]) -> int:
        """See `Cache.fit`."""
        return super().fit(parents[:PENDING_ROWS])

    def make_room(self, tree: TreeLayout) -> None:
        """See `HostCache.make_room`."""
        if len(tree.parents) > PENDING_ROWS:
            raise ValueError(f"a tree of {len(tree.parents)} rows: at most {PENDING_ROWS}")
        super().make_room(tree)

    # --- places to come back to ---

    def take(self, rows: int) -> list[NDArray[np.uint8]]:
        """See `Portable.take`: up to where the cache stands, or to a checkpoint."""
        self._kept.check(rows, self._length)
        state = self._state() if rows == self._length else self._kept.get(rows) or self._empty()
        return [*super().take(rows), *(part.copy() for part in state.parts)]

    def put(self, parts: Sequence[NDArray[np.uint8]], rows: int) -> None:
        """See `Portable.put`."""
        state = self._empty()
        if [part.shape for part in parts[2:]] != [view.shape for view in state.parts]:
            raise ValueError(f"not {rows} rows of this model and these cache types")
        super().put(parts[:2], rows)
        for view, part in zip(state.parts, parts[2:], strict=True):
            view[...] = part
        self.drop()
        self._set(state)
        self._kept.clear()
        self._kept.keep(rows, state)

    def close(self) -> None:
        """See `HostCache.close`."""
        super().close()
        self._kept.clear()
        self.memory, self.saved = self.memory[:0].copy(), self.saved[:0].copy()
        self.records = self.records[:0].copy()
        for name in ("memory", "saved", "records"):
            self.states[name] = 0

    def _keep(self) -> None:
        self._kept.keep(self._length, self._state())

    def _state(self) -> State:
        """A copy of the state behind all committed rows."""
        book = self._book
        if book.accepted:
            self._settle()
        memory = self.memory if book.ahead is None else self.saved
        channels = self._layout.hybrid.channels
        return State(memory.copy(), self.records[:, book.window, :channels])

    def _empty(self) -> State:
        """Of a text that has not begun."""
        layout = self._layout
        shapes = (layout.memory,), (BACK, layout.hybrid.channels)
        return State(*(np.zeros((layout.n_layers, *shape), np.float32) for shape in shapes))

    def _set(self, state: State | None) -> None:
        """Take over a state; None: of a text that has not begun."""
        state = state or self._empty()
        self._book.begin()
        self.memory[...] = state.memory
        self.records[:, :BACK, : self._layout.hybrid.channels] = state.rows

    def _settle(self) -> None:
        """Make the accepted rows part of the state."""
        apply, run = np.array(self._book.accepted, np.int32), np.zeros(1, k.RUN)
        run["applied"], run["apply"] = len(apply), apply.ctypes.data
        hybrid = self._layout.hybrid
        step = Step(op=k.RECUR, tasks=hybrid.inner // tile_columns(hybrid))
        step.n_head, step.n_head_kv = hybrid.n_value_heads, hybrid.n_key_heads
        step.head_dim, step.run = hybrid.head_dim, run.ctypes.data
        for layer in range(self._layout.n_layers):
            step.state = self.states[layer:].ctypes.data
            self._kernels.library.orthrus_run_here(ctypes.addressof(step))
        self._book.accepted = []


def tile_columns(hybrid: Hybrid) -> int:
    """Columns of a value head's state that a task of the recurrence takes."""
    wide = k.WIDE * LANES
    return LANES if hybrid.head_dim % wide else wide


def _describe(
    plan: RunPlan, first: int, rows: NDArray[np.void], run: NDArray[np.void]
) -> list[Ints]:
    """Tell the kernels of a plan; see `HybridCpuCache.plan`."""
    rows["record"], rows["follows"], rows["replays"] = plan.records, 1, 0
    rows["back"] = np.where(plan.back >= 0, plan.back + first, plan.back)
    keep = [np.array(plan.apply, np.int32)]
    for row, records in plan.replays.items():
        index = np.array(records, np.int32)
        rows["follows"][row], rows["replays"][row] = 0, len(index)
        rows["replay"][row] = index.ctypes.data
        keep.append(index)
    run["applied"], run["apply"] = len(plan.apply), keep[0].ctypes.data
    run["advance"], run["save"] = plan.advance, plan.begins
    return keep
