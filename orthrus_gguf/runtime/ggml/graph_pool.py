"""Graphs that have run before, kept ready to run again."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.tensors import array_at
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.graph import Graph, build_graph
from orthrus_gguf.runtime.ggml.input_tensors import ShareInputs
from orthrus_gguf.runtime.ggml.inputs import InputArrays, ShareArrays
from orthrus_gguf.runtime.ggml.shape import Shape, Share
from orthrus_gguf.runtime.ggml.weights import Weights
from orthrus_gguf.runtime.protocol import Logits

#: Graphs kept at most; each takes some 0.5 kB per operation.
MAX_GRAPHS = 48


@dataclass(frozen=True)
class ReadyGraph:
    """A graph with memory: set `inputs`, run `graph`, read the others before the next one runs.

    logits: [wanted, n_vocab]; no rows where none are wanted. taps: [rows, n_embd] each.
    """

    context: int
    graph: int
    inputs: InputArrays
    logits: Logits
    taps: dict[int, NDArray[np.float32]]


class GraphPool:
    """Least recently used graphs of one model. They share one block of memory for their data,
    because only one runs at a time; when a graph needs a larger block, the others are built anew.
    """

    def __init__(self, api: Ggml, config: ModelConfig, weights: Weights) -> None:
        self._api, self._config, self._weights = api, config, weights
        self._graphs: OrderedDict[Shape, ReadyGraph] = OrderedDict()
        self._forgotten: deque[int] = deque()
        self._allocator = api.gallocr_new(api.backend_cpu_buffer_type())
        self.built = 0

    @property
    def buffer_bytes(self) -> int:
        """Size of the shared block."""
        return int(self._api.gallocr_get_buffer_size(self._allocator, 0))

    def get(self, caches: Sequence[GgmlCache], shape: Shape) -> ReadyGraph:
        """The graph of this shape; its shares are on these caches, in order.

        Raises OrthrusError when memory runs out.
        """
        while self._forgotten:
            self._drop(self._forgotten.popleft())
        ready = self._graphs.get(shape)
        if ready is None:
            ready = self._graphs[shape] = self._build(caches, shape)
            if len(self._graphs) > MAX_GRAPHS:
                self._api.free(self._graphs.popitem(last=False)[1].context)
        self._graphs.move_to_end(shape)
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
        for shape in [shape for shape in self._graphs if shape.is_about(serial)]:
            self._api.free(self._graphs.pop(shape).context)

    def _drop_all(self) -> None:
        while self._graphs:
            self._api.free(self._graphs.popitem()[1].context)

    def _build(self, caches: Sequence[GgmlCache], shape: Shape) -> ReadyGraph:
        api = self._api
        graph = build_graph(api, self._config, self._weights, caches, shape)
        before = self.buffer_bytes
        # By itself, it would take over the last graph's places where the number of operations is
        # the same, whatever they are.
        api.gallocr_reserve(self._allocator, graph.graph)
        allocated = self.buffer_bytes and api.gallocr_alloc_graph(self._allocator, graph.graph)
        if not allocated or self.buffer_bytes != before:
            self._drop_all()  # their data lay in the block that is gone
        if not allocated:
            api.free(graph.context)
            reach = max(share.columns for share in shape.shares)
            raise OrthrusError(
                f"not enough memory for a pass of {shape.rows} rows over {reach} tokens; "
                "choose a smaller context with -c, or smaller batches with -b"
            )
        self.built += 1
        return ReadyGraph(
            graph.context,
            graph.graph,
            self._input_arrays(caches, graph, shape),
            self._logits(graph, shape),
            {
                tap: self._array(tensor, np.float32, shape.rows, self._config.n_embd)
                for tap, tensor in zip(shape.taps, graph.taps, strict=True)
            },
        )

    def _array(self, tensor: int, dtype: type[np.generic], *sizes: int) -> NDArray[Any]:
        return array_at(self._api.get_data(tensor), dtype, sizes)

    def _input_arrays(self, caches: Sequence[GgmlCache], graph: Graph, shape: Shape) -> InputArrays:
        inputs = graph.inputs
        return InputArrays(
            tokens=self._array(inputs.tokens, np.int32, shape.rows),
            positions=self._array(inputs.positions, np.int32, shape.rows),
            wanted=None
            if inputs.wanted is None
            else self._array(inputs.wanted, np.int32, shape.wanted),
            shares=tuple(map(self._share_arrays, caches, inputs.shares, shape.shares)),
        )

    def _share_arrays(self, cache: GgmlCache, inputs: ShareInputs, share: Share) -> ShareArrays:
        stores = share.stores or share.rows
        return ShareArrays(
            key_rows=self._array(inputs.key_rows, np.int64, stores),
            value_rows=self._array(inputs.value_rows, np.int64, stores, len(cache.element_offsets)),
            mask=self._array(inputs.mask, np.float16, share.rows, share.columns),
            stored=None if inputs.stored is None else self._array(inputs.stored, np.int32, stores),
            element_offsets=cache.element_offsets,
        )

    def _logits(self, graph: Graph, shape: Shape) -> Logits:
        sizes = (shape.wanted, self._config.n_vocab)
        if graph.logits is None:
            return np.empty(sizes, np.float32)
        return self._array(graph.logits, np.float32, *sizes)
