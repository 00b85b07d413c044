"""GgmlModel: a model on the CPU, in ggml."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.binding import STATUS_SUCCESS
from orthrus_gguf.ggml.library import Library, load_library
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cache_layout import BATCH_ROWS, CacheLayout, cache_layout
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.cache_layout import ar_rows, columns_for
from orthrus_gguf.runtime.ggml.graph_pool import GraphPool
from orthrus_gguf.runtime.ggml.sequences import rows_of, share_of
from orthrus_gguf.runtime.ggml.shape import Shape
from orthrus_gguf.runtime.ggml.threads import shared_pool
from orthrus_gguf.runtime.ggml.weights import Weights
from orthrus_gguf.runtime.host_model import HostModel
from orthrus_gguf.runtime.limits import thread_count
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.results import Outputs
from orthrus_gguf.runtime.sequences import OneSequence, by_sequence


class GgmlModel(HostModel[GgmlCache]):
    """See `HostModel`."""

    _kind = GgmlCache

    def __init__(
        self, file: ModelFile, library: Library, layout: CacheLayout, threads: int, batch_rows: int
    ) -> None:
        """Take over checked settings; see `load`."""
        super().__init__(file.config, layout, batch_rows)
        self._library, self._api, self._threads = library, library.api, threads
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
            self._own(stack.pop_all())

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
        layout = cache_layout(file.config, cache_type_k, cache_type_v)
        return cls(file, load_library(), layout, thread_count(threads), batch_rows)

    @property
    def description(self) -> str:
        types = "/".join(sorted(qtype.name for qtype in self._weights.types))
        plural = "" if self._threads == 1 else "s"
        return (
            f"cpu (ggml {self._library.version}, {self._threads} thread{plural}, "
            f"{types} weights, {self._layout.words} cache)"
        )

    def new_cache(self, capacity: int) -> GgmlCache:
        """See `HostModel.new_cache`."""
        self._check_open()
        cache = GgmlCache(self._api, self._layout, capacity, self._block_rows)
        weakref.finalize(cache, self._graphs.forget, cache.serial)
        return cache

    def _max_ar_rows(self, sequences: dict[int, OneSequence[GgmlCache]]) -> int:
        """AR rows of one pass that keep its attention scores within SCORE_BYTES."""
        reach = columns_for(max(own.reach for own in sequences.values()))
        return ar_rows(self.config, self._layout, reach, self._batch_rows)

    def _run_pass(
        self,
        pieces: Sequence[Piece],
        sequences: dict[int, OneSequence[GgmlCache]],
        *,
        with_taps: bool,
    ) -> Outputs:
        parts, wanted, taps = by_sequence(pieces, sequences), 0, set[int]()
        for piece in pieces:
            wanted += len(piece.wanted)
            if with_taps:
                taps.update(piece.segment.taps)
        shares = tuple(share_of(own, own_pieces) for own, own_pieces in parts)
        shape = Shape(shares, wanted, tuple(sorted(taps)))
        ready = self._graphs.get([own.cache for own, _ in parts], shape)
        ready.inputs.fill(pieces, [rows_of(own, own_pieces) for own, own_pieces in parts])
        with self._pool.lock:
            status = self._api.backend_graph_compute(self._backend, ready.graph)
        if status != STATUS_SUCCESS:
            raise OrthrusError(
                f"ggml could not run a pass of {shape.rows} rows (status {status}); "
                "memory may have run out: choose a smaller context with -c"
            )
        return Outputs(ready.logits, ready.taps)
