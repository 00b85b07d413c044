"""CpuModel: a model on the native kernels, whose passes cost little more for many rows."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import Kernels, Step

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.rope import frequencies
from orthrus_gguf.runtime.cpu.cache import CpuCache
from orthrus_gguf.runtime.cpu.steps import Buffers, Builder, Shape
from orthrus_gguf.runtime.cpu.weights import Weights
from orthrus_gguf.runtime.drawing import draw_choices
from orthrus_gguf.runtime.passes import Piece, cut
from orthrus_gguf.runtime.protocol import (
    Choices,
    Logits,
    Segment,
    View,
    check_segments,
)
from orthrus_gguf.runtime.trees import TreeLayout, tree_layout

#: AR rows of one pass; Ctrl-C waits for it to end.
BATCH_ROWS = 64

#: Diffusion rows of one pass: four blocks of the released models. More run as several passes.
BLOCK_ROWS = 128

#: Lists of steps that are kept.
SHAPES = 64

#: Positions whose cosines and sines are computed at once.
ANGLES = 1024

Taps = NDArray[np.float32]
T = TypeVar("T")


@dataclass
class _Sequence:
    """A sequence in a call: rows held before and, when all passes have run, behind its AR rows."""

    cache: CpuCache
    end: int
    ar_rows: int = 0
    tree: TreeLayout | None = None


class CpuModel:
    """See `protocol.Model`. Use as a context manager, or close it.

    One pass runs at a time; calls from several threads wait for one another.
    """

    def __init__(self, file: ModelFile, kernels: Kernels, threads: int, batch_rows: int) -> None:
        """Take over checked settings; see `load`."""
        self.config = config = file.config
        self._kernels, self._threads, self._batch_rows = kernels, threads, batch_rows
        self._block_rows = max(BLOCK_ROWS, config.block_size or 0)
        self._lock = threading.Lock()
        library = kernels.library
        with ExitStack() as stack:
            self._pool = library.orthrus_pool_new(threads)
            if not self._pool:
                raise OrthrusError(f"cannot start {threads} threads; use fewer with --threads")
            stack.callback(library.orthrus_pool_free, self._pool)
            self._weights = Weights(file, kernels, threads)
            stack.callback(self._weights.close)
            self._buffers = Buffers(config, batch_rows + self._block_rows)
            self._finalizer = weakref.finalize(self, stack.pop_all().close)
        self._shapes: OrderedDict[Shape, ctypes.Array[Step]] = OrderedDict()
        self._frequencies, self._magnitude = frequencies(config.rope, config.head_dim)
        self._angles: dict[int, NDArray[np.float32]] = {}

    @classmethod
    def load(
        cls,
        file: ModelFile,
        kernels: Kernels,
        *,
        threads: int,
        batch_rows: int = BATCH_ROWS,
    ) -> CpuModel:
        """Make a model of an open file, for which `weights.why_not` says nothing.

        batch_rows: most AR rows of one pass; longer segments run as several.
        Raises OrthrusError when memory or threads cannot be had.
        """
        return cls(file, kernels, threads, batch_rows)

    @property
    def description(self) -> str:
        types = "/".join(sorted(qtype.name for qtype in self._weights.types))
        plural = "" if self._threads == 1 else "s"
        return (
            f"cpu ({self._kernels.isa}, {self._threads} thread{plural}, {types} weights, f16 cache)"
        )

    def new_cache(self, capacity: int) -> CpuCache:
        """See `Model.new_cache`. The cache frees itself when it is no longer used."""
        self._check_open()
        return CpuCache(self.config, capacity, self._block_rows)

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """See `Model.forward`."""

        def draw(segment: Segment, logits: Logits, taps: Taps | None) -> Choices:
            return Choices(draw_choices(segment, logits), taps)

        return self._run(segments, draw, with_taps=True)

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        """See `Model.logits`."""
        return self._run(segments, lambda _, logits, __: logits.copy(), with_taps=False)

    def close(self) -> None:
        """Free everything but the caches handed out."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> CpuModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise OrthrusError("the model is closed; load it again")

    def _sequences(self, segments: Sequence[Segment]) -> dict[int, _Sequence]:
        """The sequences of a call by their cache's id, in order, with nothing pending."""
        found: dict[int, _Sequence] = {}
        for segment in segments:
            cache = segment.cache
            if not isinstance(cache, CpuCache) or len(cache.layers) != self.config.n_layers:
                raise ValueError("the cache belongs to another model")
            own = found.get(id(cache))
            if own is None:
                cache.drop()
                own = found[id(cache)] = _Sequence(cache, cache.length)
            if segment.view is View.AR:
                own.ar_rows = len(segment)
                own.end += own.ar_rows
        return found

    def _check(self, segments: Sequence[Segment]) -> None:
        check_segments(segments)
        for segment in segments:
            low, high = min(segment.tokens), max(segment.tokens)
            if low < 0 or high >= self.config.n_vocab:
                raise OrthrusError(
                    f"token {low if low < 0 else high} is outside the vocabulary of "
                    f"{self.config.n_vocab}; the tokenizer does not belong to this model"
                )
            if segment.view is View.DIFFUSION:
                if not self.config.has_heads:
                    raise OrthrusError(
                        f"{self.config.name} has no diffusion heads; use --strategy ar"
                    )
                if len(segment) > self._block_rows:
                    raise ValueError(
                        f"block of {len(segment)} rows, at most {self._block_rows} fit"
                    )

    def _run(
        self,
        segments: Sequence[Segment],
        result: Callable[[Segment, Logits, Taps | None], T],
        *,
        with_taps: bool,
    ) -> list[T]:
        """Run the passes of a call; what `result` makes of each segment's logits and taps."""
        with self._lock:
            self._check_open()
            sequences = self._sequences(segments)
            self._check(segments)
            for segment in segments:
                if segment.parents is not None:
                    own = sequences[id(segment.cache)]
                    own.tree = tree_layout(segment.parents, segment.start)
                    own.cache.make_room(own.tree)
            parts: dict[int, list[tuple[Logits, Taps | None]]] = {}
            found: dict[int, T] = {}
            for pieces in cut(segments, self._batch_rows, self._block_rows):
                self._run_pass(pieces, sequences, with_taps=with_taps)
                for piece, logits, taps in self._results(pieces, with_taps=with_taps):
                    mine = parts.setdefault(piece.index, [])
                    if piece.first + piece.count < len(piece.segment):
                        mine.append((logits.copy(), taps))
                        continue
                    mine.append((logits, taps))
                    found[piece.index] = result(piece.segment, *_joined(parts.pop(piece.index)))
            for own in sequences.values():
                if own.ar_rows:
                    own.cache.hold(own.ar_rows, own.tree)
        return [
            found[index] if index in found else result(segment, self._no_logits, None)
            for index, segment in enumerate(segments)
        ]

    @property
    def _no_logits(self) -> Logits:
        return np.empty((0, self.config.n_vocab), np.float32)

    def _run_pass(
        self, pieces: Sequence[Piece], sequences: dict[int, _Sequence], *, with_taps: bool
    ) -> None:
        b = self._buffers
        slots = {key: slot for slot, key in enumerate(sequences)}
        for key, own in sequences.items():
            b.caches[:, slots[key]] = own.cache.layers
        groups: list[tuple[int, int]] = []
        keep: list[NDArray[np.int32]] = []  # alive until the pass has run
        wanted: list[int] = []
        row = ar = 0
        for piece in pieces:
            own = sequences[id(piece.segment.cache)]
            rows = b.row[row : row + piece.count]
            rows["token"], rows["cache"], rows["copies"] = piece.tokens, slots[id(own.cache)], 0
            groups += [(row + first, count) for first, count in self._place(piece, own, rows, keep)]
            wanted += [row + i for i in piece.wanted]
            row += piece.count
            if piece.segment.view is View.AR:
                ar += piece.count
        b.group[: len(groups)] = groups
        b.index[: len(wanted)] = wanted
        taps = {tap for piece in pieces for tap in piece.segment.taps} if with_taps else ()
        steps = self._steps(Shape(ar, row - ar, len(wanted), len(groups), tuple(sorted(taps))))
        self._kernels.library.orthrus_run(self._pool, ctypes.addressof(steps), len(steps))

    def _place(
        self,
        piece: Piece,
        own: _Sequence,
        rows: NDArray[np.void],
        keep: list[NDArray[np.int32]],
    ) -> list[tuple[int, int]]:
        """Say where the rows of a piece go and what they see; groups (first row, rows)."""
        count, start = piece.count, piece.start
        rows["from"] = rows["to"] = 0
        if own.tree is not None:
            return self._place_tree(own.tree, rows, keep)
        self._turn(rows, np.arange(start, start + count))
        if piece.segment.view is View.AR:
            rows["key"] = np.arange(start, start + count)
            rows["sees"] = np.arange(start + 1, start + count + 1)
        else:
            # Behind all AR rows, where a panel begins; the next AR rows overwrite it.
            at = -(-own.end // 16) * 16 + self._block_at(piece)
            rows["key"] = np.arange(at, at + count)
            rows["sees"], rows["from"], rows["to"] = start, at, at + count
        return [(0, count)]

    def _block_at(self, piece: Piece) -> int:
        """Columns between the blocks of a sequence: whole panels."""
        return piece.offset * 16 if piece.offset else 0

    def _place_tree(
        self, tree: TreeLayout, rows: NDArray[np.void], keep: list[NDArray[np.int32]]
    ) -> list[tuple[int, int]]:
        """The same for a tree: rows of a branch see the cache up to `edge` and their region."""
        depths = np.array(tree.depths, np.int32)
        self._turn(rows, tree.start + depths)
        stores: dict[int, list[int]] = {}
        for row, column in tree.stores:
            stores.setdefault(row, []).append(column)
        groups: list[tuple[int, int]] = []
        for row, home in enumerate(tree.home):
            column = tree.column(row)
            rows["key"][row] = column
            others = np.array([c for c in stores[row] if c != column], np.int32)
            if len(others):
                keep.append(others)
                rows["copies"][row], rows["more_keys"][row] = len(others), others.ctypes.data
            if home == tree.edge:
                rows["sees"][row] = column + 1
            else:
                rows["sees"][row], rows["from"][row] = tree.edge, home
                rows["to"][row] = column + 1
            if groups and tree.home[row - 1] == home:
                groups[-1] = groups[-1][0], groups[-1][1] + 1
            else:
                groups.append((row, 1))
        return groups

    def _turn(self, rows: NDArray[np.void], positions: NDArray[np.signedinteger[Any]]) -> None:
        """Point rows at the cosines and sines of their positions."""
        half = self.config.head_dim // 2
        blocks = positions // ANGLES
        base = np.array([self._table(int(block)).ctypes.data for block in blocks], np.uintp)
        at = base + (positions % ANGLES * half * 4).astype(np.uintp)
        rows["cos"], rows["sin"] = at, at + np.uintp(ANGLES * half * 4)

    def _table(self, block: int) -> NDArray[np.float32]:
        """Cosines and sines [2, ANGLES, head_dim / 2] of a run of positions."""
        table = self._angles.get(block)
        if table is None:
            positions = np.arange(block * ANGLES, (block + 1) * ANGLES, dtype=np.float64)
            angles = positions[:, None] * self._frequencies
            both = np.stack([np.cos(angles), np.sin(angles)]) * self._magnitude
            table = self._angles[block] = both.astype(np.float32)
        return table

    def _steps(self, shape: Shape) -> ctypes.Array[Step]:
        steps = self._shapes.get(shape)
        if steps is None:
            builder = Builder(self._kernels, self.config, self._weights, self._buffers, shape)
            steps = self._shapes[shape] = builder.build()
            if len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(shape)
        return steps

    def _results(
        self, pieces: Sequence[Piece], *, with_taps: bool
    ) -> list[tuple[Piece, Logits, Taps | None]]:
        """Logits of the wanted rows of each piece, where they lie, and a copy of its taps."""
        found = []
        row = wanted = 0
        logits = self._buffers.logits[:, : self.config.n_vocab]
        for piece in pieces:
            asked, taps = len(piece.wanted), None
            if with_taps and piece.segment.taps:
                rows = slice(row, row + piece.count)
                taps = np.stack(
                    [
                        self._buffers.taps[tap][rows, : self.config.n_embd]
                        for tap in piece.segment.taps
                    ]
                )
            found.append((piece, logits[wanted : wanted + asked], taps))
            row, wanted = row + piece.count, wanted + asked
        return found


def _joined(parts: list[tuple[Logits, Taps | None]]) -> tuple[Logits, Taps | None]:
    """The parts of a segment as one; nothing is copied where only the last has logits."""
    if len(parts) == 1:
        return parts[0]
    logits = [part for part, _ in parts if len(part)] or [parts[0][0]]
    taps = [part for _, part in parts if part is not None]
    return (
        logits[0] if len(logits) == 1 else np.concatenate(logits),
        np.concatenate(taps, axis=1) if taps else None,
    )
