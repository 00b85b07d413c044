"""GgmlModel: a model on the CPU, in ggml."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from orthrus_gguf.runtime.ggml.results import Gathered, Taps
from orthrus_gguf.runtime.ggml.sequences import OneSequence, by_sequence, sequences_of
from orthrus_gguf.runtime.ggml.shape import Shape
from orthrus_gguf.runtime.ggml.threads import shared_pool
from orthrus_gguf.runtime.ggml.weights import Weights
from orthrus_gguf.runtime.limits import thread_count
from orthrus_gguf.runtime.passes import Piece, cut
from orthrus_gguf.runtime.protocol import Choices, Logits, Segment, View, check_segments

T = TypeVar("T")


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

    def _check(self, segments: Sequence[Segment], sequences: dict[int, OneSequence]) -> None:
        self._check_open()
        if any(own.cache.layout is not self._layout for own in sequences.values()):
            raise ValueError("the cache belongs to another model")
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
            sequences = sequences_of(segments)
            self._check(segments, sequences)
            for own in sequences.values():
                own.prepare()
            gathered, found = Gathered(with_taps=with_taps), {}
            for pieces in cut(segments, self._max_ar_rows(sequences), self._spare_rows):
                ready = self._run_pass(pieces, sequences, with_taps=with_taps)
                for index, logits, taps in gathered.add(pieces, ready):
                    found[index] = result(segments[index], logits, taps)
            for own in sequences.values():
                own.finish()
        return [
            found[index] if index in found else result(segment, self._no_logits, None)
            for index, segment in enumerate(segments)
        ]

    @property
    def _no_logits(self) -> Logits:
        return np.empty((0, self.config.n_vocab), np.float32)

    def _max_ar_rows(self, sequences: dict[int, OneSequence]) -> int:
        """AR rows of one pass that keep its attention scores within SCORE_BYTES."""
        reach = columns_for(max(own.reach for own in sequences.values()))
        return ar_rows(self.config, self._layout, reach, self._batch_rows)

    def _run_pass(
        self, pieces: Sequence[Piece], sequences: dict[int, OneSequence], *, with_taps: bool
    ) -> ReadyGraph:
        parts, wanted, taps = by_sequence(pieces, sequences), 0, set[int]()
        for piece in pieces:
            wanted += len(piece.wanted)
            if with_taps:
                taps.update(piece.segment.taps)
        shares = tuple(own.share(own_pieces) for own, own_pieces in parts)
        shape = Shape(shares, wanted, tuple(sorted(taps)))
        ready = self._graphs.get([own.cache for own, _ in parts], shape)
        ready.inputs.fill(pieces, [own.rows(own_pieces) for own, own_pieces in parts])
        with self._pool.lock:
            status = self._api.backend_graph_compute(self._backend, ready.graph)
        if status != STATUS_SUCCESS:
            raise OrthrusError(
                f"ggml could not run a pass of {shape.rows} rows (status {status}); "
                "memory may have run out: choose a smaller context with -c"
            )
        return ready
