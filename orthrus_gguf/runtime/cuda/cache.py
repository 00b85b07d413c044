"""Keys and values of one sequence on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from orthrus_kernels.attention.kv_cache import (
    FORMATS,
    HEAD_DIMS,
    QBLOCK,
    KvPlanes,
    cache_entry,
    new_planes,
)
from orthrus_kernels.recurrence.states import STATE_DIMS
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cuda.trees import TreeLayout, tree_layout
from orthrus_gguf.runtime.passes import check_path
from orthrus_gguf.runtime.protocol import Checkpoint, is_chain


def check_head_size(config: ModelConfig) -> None:
    """Raise OrthrusError for heads that no kernel takes: of attention, DeltaNets, drafts."""
    if config.head_dim not in HEAD_DIMS:
        raise OrthrusError(
            f"{config.name}: heads of {config.head_dim} elements have no CUDA kernel "
            f"(expected {', '.join(map(str, HEAD_DIMS))}); use --runtime cpu"
        )
    if config.hybrid is not None and config.hybrid.head_dim not in STATE_DIMS:
        raise OrthrusError(
            f"{config.name}: DeltaNet heads of {config.hybrid.head_dim} elements have no CUDA"
            f" kernel (expected {', '.join(map(str, STATE_DIMS))}); use --runtime cpu"
        )


def check_cache_types(config: ModelConfig, type_k: str, type_v: str) -> None:
    """Raise OrthrusError for cache types that this runtime or this model cannot have."""
    for option, name in (("-ctk", type_k), ("-ctv", type_v)):
        if name not in FORMATS:
            raise OrthrusError(
                f"{option} {name}: the cuda runtime keeps its cache in {', '.join(FORMATS)}"
            )
        if name != "f16" and config.head_dim % QBLOCK:
            raise OrthrusError(
                f"{option} {name}: needs a head size that is a multiple of {QBLOCK}, this model's "
                f"is {config.head_dim}; use f16"
            )


def new_cache_planes(
    config: ModelConfig, type_k: str, type_v: str, columns: int, device: torch.device
) -> tuple[KvPlanes, KvPlanes]:
    """Keys and values of all layers of attention, for `columns` rows."""
    layers = config.layer_kinds.count(LayerKind.ATTENTION)
    keys, values = (
        new_planes(name, config.n_head_kv, columns, config.head_dim, device, layers)
        for name in (type_k, type_v)
    )
    return keys, values


@contextmanager
def allocating(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """Memory that cannot be had is one line."""
    try:
        yield
    except RuntimeError as error:  # torch's out-of-memory errors, on any device
        reason = str(error).splitlines()[0]
        raise OrthrusError(f"{what} cannot be allocated on {device}: {reason}; {advice}") from error


class CudaCache:
    """See `protocol.Cache`. It needs no graph of its own: graphs find it through a table.

    planes: keys and values of all layers, with columns beyond the capacity for branches of trees.
    entry: its row in that table. moves: (from, to) of columns that the next pass copies before it
    does anything else: a path of a tree that was committed.
    """

    def __init__(
        self,
        config: ModelConfig,
        type_k: str,
        type_v: str,
        capacity: int,
        anchor: Tensor,
        spare: int,
    ) -> None:
        """anchor: see `kv_cache.Caches`; on the cache's device. spare: columns for branches, and
        most rows of a tree. OrthrusError if it cannot fit."""
        if capacity < 1:
            raise OrthrusError(f"a context of {capacity} tokens: expected at least 1")
        advice = "choose a smaller one with -c, or smaller cache types with -ctk and -ctv"
        with allocating(f"a context of {capacity} tokens", anchor.device, advice):
            planes = new_cache_planes(config, type_k, type_v, capacity + spare, anchor.device)
        self.planes: tuple[KvPlanes, KvPlanes] | None = planes
        self.anchor = anchor
        self.entry = cache_entry(*planes, anchor)
        self.moves: list[tuple[int, int]] = []
        self._pending: tuple[int, TreeLayout | None] | None = None
        self._capacity, self._spare = capacity, spare
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache.commit`. A chain's rows lie where they belong; the next pass moves a tree's
        path there."""
        if self._pending is None:
            raise ValueError("no AR rows are pending: the last pass on this cache ran none")
        count, tree = self._pending
        check_path(rows, count, None if tree is None else tree.parents)
        if tree is not None:
            self.moves += tree.moves(rows)
        self._length += len(rows)
        self._pending = None

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        """See `Cache.checkpoint`: anywhere up to where it stands."""
        length = self._length if length is None else length
        if not 0 <= length <= self._length:
            raise ValueError(f"no place to come back to: {length} of {self._length} rows held")
        return Checkpoint(length)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Cache.restore`."""
        self._length = self.checkpoint(checkpoint.length).length
        self._pending = None

    def fit(self, parents: Sequence[int]) -> int:
        """See `Cache.fit`: a tree is one pass, and its branches take columns beyond the rows."""
        if is_chain(parents):
            return len(parents)
        count = min(len(parents), self._spare)
        while count > 1 and not self.holds(tree_layout(parents[:count], self._length)):
            count -= 1
        return count

    def holds(self, tree: TreeLayout) -> bool:
        """Whether there are columns for a tree."""
        return tree.columns <= self._capacity + self._spare

    def assume(self, rows: int) -> None:
        """See `Cache.assume`."""
        if not 0 <= rows <= self._capacity - self._length:
            raise ValueError(f"no room for {rows} rows after {self._length} of {self._capacity}")
        self._length += rows
        self._pending = None

    def hold(self, rows: int, tree: TreeLayout | None = None) -> None:
        """Have that many rows, which a pass has written, wait for `commit`."""
        self._pending = rows, tree

    def drop(self) -> None:
        """Forget what is pending."""
        self._pending = None

    def close(self) -> None:
        """Free the memory; it cannot be used afterwards."""
        self.planes = None
        self._pending = None
        self._capacity = self._length = 0
