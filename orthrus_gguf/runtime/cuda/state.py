"""Keys, values and state of one sequence of a hybrid on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from orthrus_kernels.recurrence.states import (
    Runs,
    StateMemory,
    States,
    StateShape,
    new_state,
    state_entry,
)
from torch import Tensor

from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.checkpoints import Checkpoints
from orthrus_gguf.runtime.cuda.cache import CudaCache, allocating
from orthrus_gguf.runtime.cuda.device import Machine
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.recurrent import BACK, Records, Returning, RunPlan, record_count

#: Pending rows of which any may be dropped. Each takes a record, twice: of 27B 3.4 MiB.
PENDING_ROWS = 16


def state_shape(config: ModelConfig) -> StateShape:
    """Of the sequences of a hybrid."""
    h = config.hybrid
    assert h is not None
    layers = config.layer_kinds.count(LayerKind.DELTA_NET)
    records = record_count(PENDING_ROWS)
    return StateShape(layers, h.n_key_heads, h.n_value_heads, h.head_dim, records)


@dataclass(frozen=True)
class State:
    """What DeltaNet layers know of a text, in host memory. memory: f32 [layers, value heads,
    head_dim, head_dim]. rows: f32 [layers, BACK, channels], what the convolution looks back on, the
    newest row last. They are there once `ready` is."""

    memory: Tensor
    rows: Tensor
    ready: Any


class HybridCudaCache(Returning[State], CudaCache):
    """See `protocol.Cache`.

    A state cannot be turned back. Of up to PENDING_ROWS pending rows, any may be dropped. Longer
    chains advance the state in a plane of its own: all of their rows are committed, or none. Else
    the cache goes back to checkpoints only, which lie in host memory.

    state, state_entry: as the kernels read it, and how they find it.
    """

    def __init__(
        self,
        config: ModelConfig,
        type_k: str,
        type_v: str,
        capacity: int,
        anchor: Tensor,
        spare: int,
        machine: Machine,
        lock: RLock,
    ) -> None:
        """machine, lock: of the model. See `CudaCache`."""
        super().__init__(config, type_k, type_v, capacity, anchor, spare)
        self._shape = state_shape(config)
        advice = "choose a smaller context with -c, or fewer sequences at once"
        with allocating("a state of a hybrid", anchor.device, advice):
            state = new_state(self._shape, anchor.device)
        self.state: StateMemory | None = state
        self.state_entry = state_entry(state, anchor)
        self._machine, self._lock = machine, lock
        self._plane = 0  # that holds the committed state
        self._stamp = 0  # of a state that has the accepted rows
        self._book = Records(PENDING_ROWS)
        assert config.hybrid is not None
        self._kept = Checkpoints[State](config.hybrid.state_bytes(config.n_layers))

    # --- passes ---

    def plan(self, piece: Piece, order: Sequence[int] | None = None) -> RunPlan:
        """What the recurrence does with a piece of an AR segment. order: of a tree's rows.

        Raises ValueError for a tree of too many rows.
        """
        if order is not None and len(order) > PENDING_ROWS:
            raise ValueError(f"a tree of {len(order)} rows: at most {PENDING_ROWS}")
        return self._book.plan(piece, order)

    def plan_block(self, piece: Piece, shared: RunPlan | None) -> RunPlan:
        """The same of a block. shared: of AR rows of this sequence in the same pass.

        Raises ValueError where the state that it begins from is not at hand.
        """
        return self._book.plan_block(piece.start, self._length, piece.count, shared)

    def run_entry(self, plan: RunPlan) -> tuple[int, int, int]:
        """The planes that a run reads and leaves its state in, and its stamp (`states.RUN`)."""
        source = 1 - self._plane if plan.ahead else self._plane
        return source, 1 - self._plane, self._stamp

    def ran(self, plan: RunPlan, order: Sequence[int] | None) -> None:
        """The pass of a piece has run."""
        self._book.ran(plan, order)

    def drop(self) -> None:
        """See `CudaCache.drop`."""
        CudaCache.drop(self)
        self._book.drop()

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache.commit`."""
        pending = self._pending[0] if self._pending else 0
        self._book.check(rows, pending)
        super().commit(rows)
        if rows:
            if self._book.commit(rows, pending):
                self._plane = 1 - self._plane
            self._stamp += 1
        self.drop()
        if self._kept.due(self._length):
            self._keep()

    def fit(self, parents: Sequence[int]) -> int:
        """See `Cache.fit`."""
        return super().fit(parents[:PENDING_ROWS])

    def close(self) -> None:
        """See `CudaCache.close`."""
        super().close()
        self.state = None
        self._kept.clear()

    # --- places to come back to ---

    def _keep(self) -> None:
        state = self.state
        assert state is not None
        with self._lock, self._machine.running():
            if self._book.accepted:
                self._settle(state)
            rows = state.records[:, self._book.window, : self._shape.channels]
            kept = State(
                self._to_host(state.memory[self._plane]),
                self._to_host(rows),
                self._machine.new_event(),
            )
            self._machine.record(kept.ready)
        self._kept.keep(self._length, kept)

    def _to_host(self, part: Tensor) -> Tensor:
        """Enqueue a copy."""
        buffer = self._machine.host_buffer(4 * part.numel()).view(torch.float32).view(part.shape)
        return buffer.copy_(part, non_blocking=True)

    def _set(self, state: State | None) -> None:
        held = self.state
        assert held is not None
        self._book.begin()
        memory, rows = held.memory[self._plane], held.records[:, :BACK, : self._shape.channels]
        with self._lock, self._machine.running():
            if state is None:
                memory.zero_()
                rows.zero_()
                return
            self._machine.wait(state.ready)
            memory.copy_(state.memory, non_blocking=True)
            rows.copy_(state.rows, non_blocking=True)

    def _settle(self, state: StateMemory) -> None:
        """Make the accepted rows part of the state: a run of no rows in every layer."""
        slots, device = self._book.accepted, self.anchor.device
        entry = [0, 0, 0, self._plane, self._plane, 0, len(slots), self._stamp, 0]
        none = torch.zeros(1, dtype=torch.int32, device=device)
        runs = Runs(
            torch.tensor([entry], dtype=torch.int32, device=device),
            none, none, none, none, none, none,
            torch.tensor(slots, dtype=torch.int32, device=device),
        )  # fmt: skip
        entries = torch.tensor([self.state_entry], device=device)
        states = States(self._shape, self.anchor, entries, [state])
        for layer in range(self._shape.layers):
            unused = state.records[layer]
            self._machine.kernels.recur(unused, unused, runs, states, layer, unused)
        self._book.accepted = []
