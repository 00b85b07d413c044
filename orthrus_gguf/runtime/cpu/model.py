"""CpuModel: a model on the native kernels, whose passes cost little more for many rows."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import LANES, Kernels, Step

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.rope import frequencies
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.attention import check_attention
from orthrus_gguf.runtime.cache_layout import BATCH_ROWS, CacheLayout, cache_layout
from orthrus_gguf.runtime.cpu.buffers import Buffers
from orthrus_gguf.runtime.cpu.cache import CpuCache, whole_panels
from orthrus_gguf.runtime.cpu.pool import Pool
from orthrus_gguf.runtime.cpu.rows import Angles, Place, place_block, place_chain, place_tree
from orthrus_gguf.runtime.cpu.state import HybridCpuCache, StateLayout
from orthrus_gguf.runtime.cpu.steps import Builder, Shape, Watch
from orthrus_gguf.runtime.cpu.weights import Weights
from orthrus_gguf.runtime.host_model import HostModel
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import Segment, View
from orthrus_gguf.runtime.results import Outputs
from orthrus_gguf.runtime.sequences import OneSequence, check_call, sequences_of

#: Lists of steps that are kept.
SHAPES = 64

#: `CpuModel.attention`: the position from which rows that nobody asks about attend sparsely, to so
#: many blocks of 128 columns beside the first one and their neighbours, so many rows together.
EXACT, BLOCKS, TOGETHER = 4096, 16, 32


class CpuModel(HostModel[CpuCache]):
    """See `HostModel`."""

    _kind = CpuCache
    _block_alignment = LANES

    def __init__(
        self,
        file: ModelFile,
        kernels: Kernels,
        layout: CacheLayout,
        threads: int,
        counts: tuple[int, ...],
        batch_rows: int,
    ) -> None:
        """Take over checked settings; see `load`."""
        super().__init__(file.config, layout, batch_rows)
        self._kernels, self.thread_counts = kernels, counts
        with ExitStack() as stack:
            self._pool = stack.enter_context(closing(Pool(kernels, threads)))
            self._weights = Weights(file, kernels, self._pool)
            stack.callback(self._weights.close)
            self._own(stack.pop_all())
        self._buffers = Buffers(kernels, file.config, batch_rows + self._block_rows)
        self._shapes: OrderedDict[Shape, ctypes.Array[Step]] = OrderedDict()
        self._angles = Angles(*frequencies(file.config.rope, file.config.rotary_dim))

    @classmethod
    def load(
        cls,
        file: ModelFile,
        kernels: Kernels,
        *,
        threads: int,
        thread_counts: tuple[int, ...] = (),
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        batch_rows: int = BATCH_ROWS,
    ) -> CpuModel:
        """Make a model of an open file, for which `weights.why_not` says nothing. The file may be
        closed afterwards. Weights are repacked in the background; the first pass waits for them.

        thread_counts: see `Threaded`.
        cache_type_k, cache_type_v: f32, f16, q8_0 or q4_0, for the caches of this model.
        batch_rows: most AR rows of one pass; longer segments run as several.
        Raises OrthrusError for a setting that cannot be used, or when memory or threads cannot be
        had.
        """
        layout = cache_layout(file.config, cache_type_k, cache_type_v)
        return cls(file, kernels, layout, threads, thread_counts, batch_rows)

    @property
    def description(self) -> str:
        types = "/".join(sorted(qtype.name for qtype in self._weights.types))
        threads = self._pool.threads
        plural = "" if threads == 1 else "s"
        return (
            f"cpu ({self._kernels.isa}, {threads} thread{plural}, {types} weights, "
            f"{self._layout.words} cache)"
        )

    def wait(self) -> None:
        """See `Loading.wait`."""
        self._pool.wait()

    def use_threads(self, count: int) -> None:
        """See `Threaded.use_threads`."""
        self._check_open()
        with self._lock:
            self._pool.start(count)

    def new_cache(self, capacity: int) -> CpuCache:
        """See `HostModel.new_cache`."""
        self._check_open()
        if self.config.hybrid is None:
            return CpuCache(self._layout, capacity, self._block_rows)
        state = StateLayout.of(self.config)
        return HybridCpuCache(self._layout, capacity, self._block_rows, state, self._kernels)

    def attention(self, segment: Segment, layers: Sequence[int]) -> NDArray[np.float32]:
        """See `Attentive.attention`."""
        with self._lock:
            self._check_open()
            sequences = sequences_of([segment], CpuCache, self._layout)
            check_call([segment], self.config, self._block_rows)
            check_attention(segment, layers, self.config)
            wanted, count = len(segment.wanted), len(segment)
            planes = self.config.n_head_kv, wanted, whole_panels(segment.stop)
            weights = np.zeros(planes, np.float32)
            # The wanted rows in a pass of their own, which knows nothing of a head.
            edges = [*range(0, count - wanted, self._batch_rows), count - wanted]
            asked = replace(segment, wanted=range(0))
            ranges = [*pairwise(edges), *([(count - wanted, count)] if wanted else [])]
            for first, stop in ranges:
                watch = Watch(tuple(layers), weights) if first == count - wanted else None
                filled = self._fill([Piece(0, asked, first, stop - first)], sequences)
                more: dict[str, Any] = {"layers": max(layers) + 1, "watch": watch}
                if watch is None and segment.start + first >= EXACT:
                    more |= {"blocks": BLOCKS, "groups": self._split(filled.shape.rows)}
                self._compute(filled, **more)
            for own in sequences.values():
                own.finish()
        largest: NDArray[np.float32] = weights.max(axis=0)
        return largest[:, : segment.stop]

    def _split(self, rows: int) -> int:
        """Let the rows of a chain attend in groups, which sparse attention chooses for; returns how
        many there are."""
        firsts = range(0, rows, TOGETHER)
        groups = [(first, min(TOGETHER, rows - first)) for first in firsts]
        self._buffers.group[: len(groups)] = groups
        return len(groups)

    def _run_pass(
        self,
        pieces: Sequence[Piece],
        sequences: dict[int, OneSequence[CpuCache]],
        *,
        with_taps: bool,
    ) -> Outputs:
        filled = self._fill(pieces, sequences)
        b, row, wanted = self._buffers, filled.shape.rows, filled.shape.wanted
        taps = {tap for piece in pieces for tap in piece.segment.taps} if with_taps else ()
        self._compute(filled, taps=tuple(sorted(taps)))
        return Outputs(
            b.logits[:wanted, : self.config.n_vocab],
            {tap: b.tap(tap)[:row, : self.config.n_embd] for tap in taps},
        )

    def _fill(self, pieces: Sequence[Piece], sequences: dict[int, OneSequence[CpuCache]]) -> Filled:
        """Tell the kernels about the rows of a pass."""
        count = sum(piece.count for piece in pieces)
        if count > self._buffers.rows:  # a tree of more rows than a pass has otherwise
            self._shapes.clear()
            self._buffers = Buffers(self._kernels, self.config, count)
        b = self._buffers
        slots: dict[int, int] = {}
        groups: list[tuple[int, int]] = []
        keep: list[NDArray[np.int32]] = []  # alive until the pass has run
        hybrids: list[HybridCpuCache] = []  # whose AR rows are in this pass
        runs = [0, 0]
        wanted: list[int] = []
        row = ar = 0
        for piece in pieces:
            own = sequences[id(piece.segment.cache)]
            slot = slots.setdefault(id(own), len(slots))
            b.caches[:, slot] = own.cache.layers
            rows = b.row[row : row + piece.count]
            rows["token"], rows["cache"] = piece.tokens, slot
            place = _place(piece, own)
            place.fill(rows, keep)
            self._angles.point(rows, place.positions)
            if isinstance(own.cache, HybridCpuCache):
                b.states[:, slot], run = own.cache.states, b.run[sum(runs) :][:1]
                state_rows = b.state_row[row : row + piece.count]
                run["first"], run["count"], run["state"] = row, piece.count, slot
                state_rows["state"] = slot
                if piece.segment.view is View.AR:
                    keep += own.cache.plan(piece, row, state_rows, run)
                    hybrids.append(own.cache)
                else:
                    alone = all(cache is not own.cache for cache in hybrids)
                    keep += own.cache.plan_block(piece.start, row, state_rows, run, alone=alone)
                runs[piece.segment.view is not View.AR] += 1
            groups += [(row + first, count) for first, count in place.groups]
            wanted += [row + i for i in piece.wanted]
            row += piece.count
            if piece.segment.view is View.AR:
                ar += piece.count
        b.group[: len(groups)] = groups
        b.index[: len(wanted)] = wanted
        sizes = ar, row - ar, len(wanted), len(groups)
        return Filled(Shape(*sizes, runs=(runs[0], runs[1])), hybrids, keep)

    def _builder(self, shape: Shape) -> Builder:
        """Of the steps of passes of a shape."""
        return Builder(self._kernels, self.config, self._weights, self._buffers, shape)

    def _compute(self, filled: Filled, **more: Any) -> None:
        """Run a pass. more: what else its shape has."""
        shape = replace(filled.shape, **more)
        steps = self._shapes.get(shape)
        if steps is None:
            steps = self._builder(shape).build()
        if shape.watch is None:  # else it is of this pass alone
            self._shapes[shape] = steps
            self._shapes.move_to_end(shape)
            if len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
        self._pool.run(steps)
        for cache in filled.hybrids:
            cache.ran()


@dataclass(frozen=True)
class Filled:
    """A pass that the kernels have been told about. hybrids: caches whose states it moves. alive:
    arrays that must be until it ends."""

    shape: Shape
    hybrids: list[HybridCpuCache]
    alive: list[NDArray[np.int32]]


def _place(piece: Piece, own: OneSequence[CpuCache]) -> Place:
    """Where the rows of a piece go, and what they see."""
    if own.tree is not None:
        return place_tree(own.tree)
    if piece.segment.view is View.AR:
        return place_chain(piece.start, piece.count)
    # Behind all AR rows, where a panel begins; the next AR rows overwrite it.
    behind = -(-own.end // LANES) * LANES
    return place_block(piece.start, piece.count, behind + piece.offset)
