"""Graphs that have run before, kept ready to run again."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.tensors import array_at
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.graph import Graph, Shape, build_graph
from orthrus_gguf.runtime.ggml.inputs import InputArrays
from orthrus_gguf.runtime.ggml.weights import Weights
from orthrus_gguf.runtime.protocol import Logits

#: Graphs kept at most; each takes some 0.5 kB per operation.
MAX_GRAPHS = 48


@dataclass(frozen=True)
class ReadyGraph:
    """A graph with memory: set `inputs`, run `graph`, read `logits` before the next one runs."""

    context: int
    graph: int
    inputs: InputArrays
    logits: Logits | None


class GraphPool:
    """Least recently used graphs of one model. They share one block of memory for their data,
    because only one runs at a time; when a graph needs a larger block, the others are built anew.
    """

    def __init__(self, api: Ggml, config: ModelConfig, weights: Weights) -> None:
        self._api, self._config, self._weights = api, config, weights
        self._graphs: OrderedDict[tuple[int, Shape], ReadyGraph] = OrderedDict()
        self._forgotten: deque[int] = deque()
        self._allocator = api.gallocr_new(api.backend_cpu_buffer_type())
        self.built = 0

    @property
    def buffer_bytes(self) -> int:
        """Size of the shared block."""
        return int(self._api.gallocr_get_buffer_size(self._allocator, 0))

    def get(self, cache: GgmlCache, shape: Shape) -> ReadyGraph:
        """The graph of this shape on this cache. Raises OrthrusError when memory runs out."""
        while self._forgotten:
            self._drop(self._forgotten.popleft())
        key = (cache.serial, shape)
        ready = self._graphs.get(key)
        if ready is None:
            ready = self._graphs[key] = self._build(cache, shape)
            if len(self._graphs) > MAX_GRAPHS:
                self._api.free(self._graphs.popitem(last=False)[1].context)
        self._graphs.move_to_end(key)
        return ready

    def forget(self, serial: int) -> None:
        """Drop the graphs of the cache with this serial number, the next time one is asked for.

        Safe to call at any moment, as garbage collection does.
        """
        self._forgotten.append(serial)

    def close(self) -> None:
        """Free everything."""
        self._drop_all()
        self._api.gallocr_free(self._allocator)

    def _drop(self, serial: int) -> None:
        for key in [key for key in self._graphs if key[0] == serial]:
            self._api.free(self._graphs.pop(key).context)

    def _drop_all(self) -> None:
        while self._graphs:
            self._api.free(self._graphs.popitem()[1].context)

    def _build(self, cache: GgmlCache, shape: Shape) -> ReadyGraph:
        api = self._api
        graph = build_graph(api, self._config, self._weights, cache, shape)
        before = self.buffer_bytes
        allocated = api.gallocr_alloc_graph(self._allocator, graph.graph)
        if not allocated or self.buffer_bytes != before:
            self._drop_all()  # their data lay in the block that is gone
        if not allocated:
            api.free(graph.context)
            raise OrthrusError(
                f"not enough memory for a pass of {shape.rows} rows over {shape.columns} tokens; "
                "choose a smaller context with -c, or smaller batches with -b"
            )
        self.built += 1
        inputs = self._input_arrays(cache, graph, shape)
        return ReadyGraph(graph.context, graph.graph, inputs, self._logits(graph, shape))

    def _input_arrays(self, cache: GgmlCache, graph: Graph, shape: Shape) -> InputArrays:
        address, inputs = self._api.get_data, graph.inputs
        layout, rows = cache.layout, shape.rows
        stores = shape.stores or rows
        values = stores * layout.kv_dim if layout.transposed else stores
        return InputArrays(
            tokens=array_at(address(inputs.tokens), np.int32, (rows,)),
            positions=array_at(address(inputs.positions), np.int32, (rows,)),
            key_rows=array_at(address(inputs.key_rows), np.int64, (stores,)),
            value_rows=array_at(address(inputs.value_rows), np.int64, (values,)),
            mask=array_at(address(inputs.mask), np.float16, (rows, shape.columns)),
            wanted=None
            if inputs.wanted is None
            else array_at(address(inputs.wanted), np.int32, (shape.wanted,)),
            stored=None
            if inputs.stored is None
            else array_at(address(inputs.stored), np.int32, (stores,)),
        )

    def _logits(self, graph: Graph, shape: Shape) -> Logits | None:
        if graph.logits is None:
            return None
        address = self._api.get_data(graph.logits)
        return array_at(address, np.float32, (shape.wanted, self._config.n_vocab))
