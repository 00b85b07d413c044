"""GgmlModel: a model on the CPU, in ggml."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.binding import STATUS_SUCCESS
from orthrus_gguf.ggml.library import Library, load_library
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.drawing import draw_choices
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.cache_layout import (
    BATCH_ROWS,
    CacheLayout,
    ar_rows,
    cache_layout,
    columns_for,
    spare_rows,
)
from orthrus_gguf.runtime.ggml.graph_pool import GraphPool, ReadyGraph
from orthrus_gguf.runtime.ggml.inputs import ShareRows
from orthrus_gguf.runtime.ggml.results import Gathered, Taps
from orthrus_gguf.runtime.ggml.shape import Shape, Share
from orthrus_gguf.runtime.ggml.threads import shared_pool, thread_count
from orthrus_gguf.runtime.ggml.trees import TreeLayout, padded_stores, tree_layout
from orthrus_gguf.runtime.ggml.weights import Weights
from orthrus_gguf.runtime.passes import Piece, cut
from orthrus_gguf.runtime.protocol import Choices, Logits, Segment, View, check_segments

T = TypeVar("T")


@dataclass
class _Sequence:
    """One sequence in a call: its cache, where its blocks' rows go, and its AR rows.

    reach: cache rows that its attention may see at most.
    """

    cache: GgmlCache
    end: int
    reach: int
    ar_rows: int = 0
    tree: TreeLayout | None = None


class GgmlModel:
    """See `protocol.Model`. Use as a context manager, or close it.

    One pass runs at a time; calls from several threads wait for one another.
    """

    def __init__(
        self, file: ModelFile, library: Library, layout: CacheLayout, threads: int, batch_rows: int
    ) -> None:
        """Take over checked settings; see `load`."""
        self.config = file.config
        self._library, self._api = library, library.api
        self._layout, self._threads, self._batch_rows = layout, threads, batch_rows
        self._lock = threading.Lock()
        api = library.api
        with ExitStack() as stack:
            self._weights = Weights(library, file)
            stack.callback(self._weights.close)
            self._pool = stack.enter_context(shared_pool(api, threads))
            self._backend = api.backend_cpu_init()
            stack.callback(api.backend_free, self._backend)
            api.backend_cpu_set_n_threads(self._backend, threads)
            api.backend_cpu_set_threadpool(self._backend, self._pool.handle)
            # Kernels that give a row other bits when it has company stay off.
            api.backend_cpu_set_use_ref(self._backend, True)
            self._graphs = GraphPool(api, file.config, self._weights)
            stack.callback(self._graphs.close)
            self._finalizer = weakref.finalize(self, stack.pop_all().close)

    @classmethod
    def load(
        cls,
        file: ModelFile,
        *,
        threads: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        batch_rows: int = BATCH_ROWS,
    ) -> GgmlModel:
        """Make a model of an open file, whose mapping is used as it is and kept alive.

        threads: default one per physical core that this process may use.
        cache_type_k, cache_type_v: f32, f16, q8_0 or q4_0, for the caches of this model.
        batch_rows: most AR rows of one pass; longer segments run as several.
        Raises OrthrusError for a library, weight type, or setting that cannot be used.
        """
        if batch_rows < 1:
            raise OrthrusError(f"-b {batch_rows}: expected at least 1 row per batch")
        layout = cache_layout(file.config, cache_type_k, cache_type_v)
        return cls(file, load_library(), layout, thread_count(threads), batch_rows)

    @property
    def description(self) -> str:
        types = "/".join(sorted(qtype.name for qtype in self._weights.types))
        cache = f"{self._layout.type_k.name.lower()}/{self._layout.type_v.name.lower()}"
        plural = "" if self._threads == 1 else "s"
        return (
            f"cpu (ggml {self._library.version}, {self._threads} thread{plural}, "
            f"{types} weights, {cache} cache)"
        )

    def new_cache(self, capacity: int) -> GgmlCache:
        """See `Model.new_cache`. The cache frees itself when it is no longer used."""
        self._check_open()
        cache = GgmlCache(self._api, self._layout, capacity, self._spare_rows)
        weakref.finalize(cache, self._graphs.forget, cache.serial)
        return cache

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """See `Model.forward`."""

        def draw(segment: Segment, logits: Logits, taps: Taps | None) -> Choices:
            return Choices(draw_choices(segment, logits), taps)

        return self._run(segments, draw, with_taps=True)

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        """See `Model.logits`."""
        return self._run(segments, lambda _, logits, __: logits.copy(), with_taps=False)

    def close(self) -> None:
        """Free everything but the caches handed out, which can only be closed from now on."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> GgmlModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _spare_rows(self) -> int:
        """Cache rows set aside for the diffusion rows of a pass."""
        return spare_rows(self.config)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise OrthrusError("the model is closed; load it again")

    def _sequences(self, segments: Sequence[Segment]) -> dict[int, _Sequence]:
        """The sequences of a call by their cache's id, in order, with nothing pending."""
        found: dict[int, _Sequence] = {}
        for segment in segments:
            cache = segment.cache
            if not isinstance(cache, GgmlCache) or cache.layout is not self._layout or cache.closed:
                raise ValueError("the cache is closed, or belongs to another model")
            own = found.get(id(cache))
            if own is None:
                cache.drop()
                own = found[id(cache)] = _Sequence(cache, cache.length, cache.length)
            own.reach += len(segment)
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
            if segment.taps and not 0 <= min(segment.taps) <= max(segment.taps) <= (
                self.config.n_layers + 1
            ):
                raise ValueError(f"taps {segment.taps}: expected 0..{self.config.n_layers + 1}")
            if segment.view is View.DIFFUSION:
                if not self.config.has_heads:
                    raise OrthrusError(
                        f"{self.config.name} has no diffusion heads; use --strategy ar"
                    )
                if len(segment) > self._spare_rows:
                    raise ValueError(
                        f"block of {len(segment)} rows, at most {self._spare_rows} fit"
                    )

    def _run(
        self,
        segments: Sequence[Segment],
        result: Callable[[Segment, Logits, Taps | None], T],
        *,
        with_taps: bool,
    ) -> list[T]:
        """Run the passes of a call; what `result` makes of each segment's logits and taps.

        It gets logits as they lie in the graph's memory, which the next pass overwrites.
        """
        with self._lock:
            sequences = self._sequences(segments)
            self._check_open()
            self._check(segments)
            for segment in segments:
                if segment.parents is not None:
                    own = sequences[id(segment.cache)]
                    own.tree = tree_layout(segment.parents, segment.start)
                    own.cache.make_room(own.tree)
            gathered, found = Gathered(with_taps=with_taps), {}
            for pieces in cut(segments, self._max_ar_rows(sequences), self._spare_rows):
                ready = self._run_pass(pieces, sequences, with_taps=with_taps)
                for index, logits, taps in gathered.add(pieces, ready):
                    found[index] = result(segments[index], logits, taps)
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

    def _max_ar_rows(self, sequences: dict[int, _Sequence]) -> int:
        """AR rows of one pass that keep its attention scores within SCORE_BYTES."""
        reach = columns_for(max(own.reach for own in sequences.values()))
        return ar_rows(self.config, self._layout, reach, self._batch_rows)

    def _run_pass(
        self, pieces: Sequence[Piece], sequences: dict[int, _Sequence], *, with_taps: bool
    ) -> ReadyGraph:
        parts = [
            (own, [piece for piece in pieces if piece.segment.cache is own.cache])
            for own in sequences.values()
        ]
        parts = [part for part in parts if part[1]]
        taps = {tap for piece in pieces for tap in piece.segment.taps} if with_taps else ()
        shape = Shape(
            tuple(_share(own, own_pieces) for own, own_pieces in parts),
            sum(len(piece.wanted) for piece in pieces),
            tuple(sorted(taps)),
        )
        ready = self._graphs.get([own.cache for own, _ in parts], shape)
        ready.inputs.fill(
            pieces, [ShareRows(own_pieces, own.end, own.tree) for own, own_pieces in parts]
        )
        with self._pool.lock:
            status = self._api.backend_graph_compute(self._backend, ready.graph)
        if status != STATUS_SUCCESS:
            raise OrthrusError(
                f"ggml could not run a pass of {shape.rows} rows (status {status}); "
                "memory may have run out: choose a smaller context with -c"
            )
        return ready


def _share(own: _Sequence, pieces: Sequence[Piece]) -> Share:
    """What a sequence has in a pass, with as many columns as its rows and blocks reach."""
    ar = diffusion = stores = reach = 0
    for piece in pieces:
        if piece.segment.view is View.AR:
            ar, reach = piece.count, piece.start + piece.count
        else:
            diffusion += piece.count
            reach = max(reach, own.end + piece.offset + piece.count)
    if own.tree is not None:
        reach, stores = own.tree.columns, padded_stores(len(own.tree.stores))
    columns = min(columns_for(reach), own.cache.rows)
    return Share(own.cache.serial, ar, diffusion, columns, stores)
