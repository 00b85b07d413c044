"""Gated DeltaNet on the reference runtime: torch, float32, one row after the other.

One sequential recurrence serves prompts, steps and verification alike: what a row computes depends
on the rows before it alone, not on how they were cut into passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.hybrid import CONV_KERNEL, Hybrid
from orthrus_gguf.runtime.checkpoints import Checkpoints
from orthrus_gguf.runtime.passes import check_path
from orthrus_gguf.runtime.protocol import path_to
from orthrus_gguf.runtime.recurrent import Returning
from orthrus_gguf.runtime.reference_cache import ReferenceCache

#: What the squared length of queries and keys is raised by, as transformers has it.
L2_EPS = 1e-6


@dataclass(frozen=True)
class DeltaNet:
    """Weights of one layer; matrices are [out, in].

    conv: [channels, kernel]. a, dt: [value heads]. norm: [head_dim].
    """

    qkv: Tensor
    gate: Tensor
    alpha: Tensor
    beta: Tensor
    conv: Tensor
    a: Tensor
    dt: Tensor
    norm: Tensor
    out: Tensor


@dataclass
class State:
    """What the DeltaNet layers know of a text: all that came before.

    memory: [layers, value heads, head_dim (key), head_dim (value)]. rows: [layers, kernel - 1,
    channels], what the convolution looks back on, the newest row last.
    """

    memory: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, config: ModelConfig) -> State:
        """Of a text that has not begun."""
        hybrid = config.hybrid
        assert hybrid is not None
        n = config.layer_kinds.count(LayerKind.DELTA_NET)
        size = hybrid.head_dim
        return cls(
            torch.zeros(n, hybrid.n_value_heads, size, size),
            torch.zeros(n, CONV_KERNEL - 1, hybrid.channels),
        )

    def copy(self) -> State:
        """Another one, to go on from here."""
        return State(self.memory.clone(), self.rows.clone())

    def apply(self, layer: int, update: Update) -> None:
        """Let a row become part of what one layer knows."""
        self.memory[layer] = _learned(self.memory[layer], update)
        self.rows[layer] = torch.cat([self.rows[layer, 1:], update.row[None]])


@dataclass(frozen=True)
class Update:
    """What one row does to the state of one layer: all that must be kept of a row that may be
    dropped again.

    decay: [value heads]. key, delta: [value heads, head_dim]. row: [channels], not convolved.
    """

    decay: Tensor
    key: Tensor
    delta: Tensor
    row: Tensor


def _decayed(memory: Tensor, decay: Tensor) -> Tensor:
    return memory * decay[:, None, None]


def _learned(memory: Tensor, update: Update) -> Tensor:
    """The one place where a state changes: replayed rows take the same instructions."""
    return _decayed(memory, update.decay) + update.key[:, :, None] * update.delta[:, None, :]


def delta_row(
    h: Tensor, w: DeltaNet, hybrid: Hybrid, state: State, layer: int, eps: float
) -> tuple[Tensor, Update]:
    """One row through one layer: what it adds to the residual stream, [1, n_embd], and what it does
    to the state, which has it afterwards.

    h: the normed row [1, n_embd]. layer: counted among the DeltaNet layers.
    """
    row = (h @ w.qkv.T)[0]
    window = torch.cat([state.rows[layer], row[None]])
    mixed = functional.silu((w.conv.T * window).sum(0))
    size, groups = hybrid.head_dim, hybrid.n_key_heads
    q, k, v = (
        mixed[: groups * size],
        mixed[groups * size :][: groups * size],
        mixed[-hybrid.inner :],
    )
    share = hybrid.n_value_heads // groups  # value head h reads key head h mod n_key_heads
    q = (_unit(q.view(groups, size)) / size**0.5).repeat(share, 1)
    k = _unit(k.view(groups, size)).repeat(share, 1)
    beta = torch.sigmoid(h @ w.beta.T)[0]
    decay = torch.exp(w.a * functional.softplus((h @ w.alpha.T)[0] + w.dt))

    known = torch.einsum("hij,hi->hj", _decayed(state.memory[layer], decay), k)
    delta = beta[:, None] * (v.view(-1, size) - known)
    update = Update(decay, k, delta, row)
    state.apply(layer, update)
    out = torch.einsum("hij,hi->hj", state.memory[layer], q)

    normed = functional.rms_norm(out, (size,), w.norm, eps)
    gated = normed * functional.silu((h @ w.gate.T).view(-1, size))
    return gated.reshape(1, -1) @ w.out.T, update


def _unit(heads: Tensor) -> Tensor:
    """Heads of length one, [heads, head_dim]."""
    return heads * torch.rsqrt(heads.pow(2).sum(-1, keepdim=True) + L2_EPS)


class HybridCache(Returning[State], ReferenceCache):
    """Keys and values of the attention layers; of the others the state behind the committed rows.

    Pending rows leave that state alone: each keeps its updates, and committing applies those of the
    rows that stay. So rejected drafts cost nothing, and no state is copied per row. A state cannot
    be turned back: the cache goes back to checkpoints only, which it makes now and then by itself
    (`checkpoints.py`), and where it is asked to.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        super().__init__(config, capacity)
        self._config = config
        self._committed = State.empty(config)
        self.state = self._committed  # of the path to the row that runs next
        self._updates: list[list[Update]] = []  # of each pending row, by layer
        self._at: list[int] = []  # pending rows that `state` has
        assert config.hybrid is not None
        self._kept = Checkpoints[State](config.hybrid.state_bytes(config.n_layers))

    def add_update(self, update: Update) -> None:
        """Of the row that runs: what the next layer did."""
        self._updates[-1].append(update)

    def pend(self, parents: tuple[int, ...]) -> None:
        super().pend(parents)
        self._updates, self._at = [], []
        self.state = self._committed.copy() if parents else self._committed

    def make_way(self) -> int:
        row = len(self._updates)
        parent = self._parents[row]
        path = path_to(parent, self._parents) if parent >= 0 else []
        if path != self._at:
            self.state = self._replayed(path)
        self._at = [*path, row]
        self._updates.append([])
        return super().make_way()

    @contextmanager
    def aside(self, start: int) -> Iterator[None]:
        """See `ReferenceCache.aside`. The block's rows find the state of the rows before `start`,
        the last of which may be pending. Raises ValueError for rows before the committed ones."""
        pending = start - self._length
        if pending < 0:
            raise ValueError(f"no state at {start}: {self._length} rows are committed")
        before, self.state = self.state, self._replayed(range(pending))
        try:
            yield
        finally:
            self.state = before

    def _replayed(self, path: Sequence[int]) -> State:
        state = self._committed.copy()
        for row in path:
            for layer, update in enumerate(self._updates[row]):
                state.apply(layer, update)
        return state

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache.commit`."""
        if not self._parents:
            raise ValueError("no rows are pending")
        check_path(rows, len(self._updates), self._parents)
        state = self.state if list(rows) == self._at else self._replayed(rows)
        super().commit(rows)
        self.state = self._committed = state
        if self._kept.due(self._length):
            self._keep()

    def _set(self, state: State | None) -> None:
        self._committed = State.empty(self._config) if state is None else state

    def drop(self) -> None:
        """Forget what is pending."""
        self.pend(())

    def _keep(self) -> None:
        """Remember the committed state, which is never written to."""
        self._kept.keep(self._length, self._committed)

    def take(self, rows: int) -> list[NDArray[np.uint8]]:
        """See `Portable.take`: up to where the cache stands, or to a checkpoint."""
        self._kept.check(rows, self._length)
        state = self._committed if rows == self._length else self._kept.get(rows)
        state = State.empty(self._config) if state is None else state
        return [*super().take(rows), *(_bytes(part).copy() for part in (state.memory, state.rows))]

    def put(self, parts: Sequence[NDArray[np.uint8]], rows: int) -> None:
        """See `Portable.put`."""
        state = State.empty(self._config)
        views = [_bytes(part) for part in (state.memory, state.rows)]
        if [part.shape for part in parts[2:]] != [view.shape for view in views]:
            raise ValueError(f"not {rows} rows of this model")
        super().put(parts[:2], rows)
        for view, part in zip(views, parts[2:], strict=True):
            view[...] = part
        self._committed = state
        self._kept.clear()
        self._keep()
        self.pend(())


def _bytes(part: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = part.numpy().reshape(-1).view(np.uint8)
    return found
