"""One forward pass as a ggml graph.

Rows run along ggml's third dimension throughout ([columns, 1, rows]); `multiply_rows` says why.
The AR rows of a pass come first. Everything but attention runs over all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from orthrus_gguf.ggml.binding import ROPE_NEOX, Ggml
from orthrus_gguf.ggml.tensors import multiply_rows
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.ggml.attention import CachedAttention
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.weights import AttentionWeights, LayerWeights, Weights
from orthrus_gguf.runtime.protocol import View

_F16 = int(gguf.GGMLQuantizationType.F16)
_I32 = int(gguf.GGMLQuantizationType.I32)
_I64 = int(gguf.GGMLQuantizationType.I64)
_F32_BYTES, _I32_BYTES = 4, 4

#: More tensors (views included) than one layer, and all the rest, can create.
TENSORS_PER_LAYER, OTHER_TENSORS = 128, 64


@dataclass(frozen=True)
class Shape:
    """What passes have in common that can use the same graph.

    ar_rows, diffusion_rows: rows of each view. wanted: rows whose logits are wanted, over both.
    columns: cache rows that attention spans, hidden ones included. stores: keys that a tree writes,
    some rows' at several places; 0 where each row's are written once.
    """

    ar_rows: int
    diffusion_rows: int
    wanted: int
    columns: int
    stores: int = 0

    @property
    def rows(self) -> int:
        return self.ar_rows + self.diffusion_rows

    def groups(self) -> list[tuple[View, int, int]]:
        """(view, first row, number of rows) of the views present."""
        ar, diffusion = self.ar_rows, self.diffusion_rows
        groups = [(View.AR, 0, ar), (View.DIFFUSION, ar, diffusion)]
        return [group for group in groups if group[2]]


@dataclass(frozen=True)
class Inputs:
    """Input tensors of a graph. All must be set before every run: their memory is reused in it.

    tokens, positions: I32 [rows]. key_rows: I64 [rows], where keys go in the cache. value_rows: the
    same for values; where these lie transposed, I64 [rows * kv_dim], element by element.
    mask: F16 [rows, columns]. wanted: I32 [wanted], None when all rows are wanted, or none.
    stored: I32 [stores] for a tree, the rows that key_rows and value_rows, as long, are about.
    """

    tokens: int
    positions: int
    key_rows: int
    value_rows: int
    mask: int
    wanted: int | None
    stored: int | None


@dataclass(frozen=True)
class Graph:
    """A graph that has no memory for its tensors' data yet.

    context: to free when done. logits: the output, float32 [wanted, n_vocab] in numpy's order;
    None when no row is wanted.
    """

    context: int
    graph: int
    inputs: Inputs
    logits: int | None


def build_graph(
    api: Ggml, config: ModelConfig, weights: Weights, cache: GgmlCache, shape: Shape
) -> Graph:
    """The graph of a pass of this shape, on this cache."""
    tensors = TENSORS_PER_LAYER * config.n_layers + OTHER_TENSORS
    headers = tensors * api.tensor_overhead() + api.graph_overhead_custom(tensors, False)
    context = api.new_context(headers + 1024)
    graph = api.new_graph_custom(context, tensors, False)
    inputs = _inputs(api, context, cache, shape)
    attention = CachedAttention(
        api,
        context,
        graph,
        cache,
        config.n_head,
        shape.columns,
        inputs.mask,
        inputs.key_rows,
        inputs.value_rows,
    )
    logits = _Builder(api, context, config, shape, inputs, attention).run(weights)
    if logits is not None:
        api.set_output(logits)
        api.build_forward_expand(graph, logits)
    return Graph(context, graph, inputs, logits)


def _inputs(api: Ggml, context: int, cache: GgmlCache, shape: Shape) -> Inputs:
    def column(qtype: int, count: int) -> int:
        return int(api.new_tensor_1d(context, qtype, count))

    rows, wanted, layout = shape.rows, shape.wanted, cache.layout
    stores = shape.stores or rows
    inputs = Inputs(
        tokens=column(_I32, rows),
        positions=column(_I32, rows),
        key_rows=column(_I64, stores),
        value_rows=column(_I64, stores * layout.kv_dim if layout.transposed else stores),
        mask=api.new_tensor_2d(context, _F16, shape.columns, rows),
        wanted=column(_I32, wanted) if 0 < wanted < rows else None,
        stored=column(_I32, stores) if shape.stores else None,
    )
    for tensor in vars(inputs).values():
        if tensor is not None:
            api.set_input(tensor)
    return inputs


@dataclass(frozen=True)
class _Builder:
    """Where the operations of one graph are put together."""

    api: Ggml
    context: int
    config: ModelConfig
    shape: Shape
    inputs: Inputs
    attention: CachedAttention

    def run(self, weights: Weights) -> int | None:
        """All layers → logits, None when no row is wanted."""
        embedded = self.api.get_rows(self.context, weights.token_embd, self.inputs.tokens)
        x = self._as_rows(embedded, self.config.n_embd, self.shape.rows)
        for index, layer in enumerate(weights.layers[:-1]):
            x = self._layer(x, layer, index)
        last = len(weights.layers) - 1
        if not self.shape.wanted:
            self._store(self._norm(x, weights.layers[last].attn_norm), weights.layers[last], last)
            return None
        x = self._layer(x, weights.layers[last], last)
        normed = self._norm(x, weights.output_norm)
        return self._multiply(weights.output, normed, self.config.n_embd, self.shape.wanted)

    def _layer(self, x: int, layer: LayerWeights, index: int) -> int:
        """x [n_embd, 1, rows] → the same after one layer; the last keeps only the wanted rows."""
        api, c, config, rows = self.api, self.context, self.config, self.shape.rows
        normed = self._norm(x, layer.attn_norm)
        self._store(normed, layer, index)
        mixed = self._attend(normed, layer, index)
        if index == config.n_layers - 1 and self.inputs.wanted is not None:
            x, mixed, rows = self._pick(x), self._pick(mixed), self.shape.wanted
        x = api.add(c, x, mixed)
        normed = self._norm(x, layer.ffn_norm)
        gate = self._multiply(layer.ffn_gate, normed, config.n_embd, rows)
        up = self._multiply(layer.ffn_up, normed, config.n_embd, rows)
        down = self._multiply(layer.ffn_down, api.swiglu_split(c, gate, up), config.n_ff, rows)
        return int(api.add(c, x, down))

    def _store(self, normed: int, layer: LayerWeights, index: int) -> None:
        """Keys and values of all rows → the cache, each by its view's weights."""
        config = self.config
        for view, first, count in self.shape.groups():
            weights, x = layer.attention[view], self._rows(normed, first, count)
            k = self._heads(weights.k, x, config.n_head_kv, count)
            k = self._rotate(self._norm(k, weights.k_norm), first, count)
            v = self._heads(weights.v, x, config.n_head_kv, count)
            if self.inputs.stored is not None:  # a tree, which is alone
                k, v, count = self._repeat(k), self._repeat(v), self.shape.stores
            self.attention.store(k, v, index, first, count)

    def _repeat(self, x: int) -> int:
        """x [head_dim, n_head_kv, rows] → the rows to be stored, [head_dim, n_head_kv, stores]."""
        api, c, config = self.api, self.context, self.config
        sizes = (config.head_dim, config.n_head_kv)
        flat = api.reshape_2d(c, x, config.head_dim * config.n_head_kv, self.shape.rows)
        picked = api.get_rows(c, flat, self.inputs.stored)
        return int(api.reshape_3d(c, picked, *sizes, self.shape.stores))

    def _attend(self, normed: int, layer: LayerWeights, index: int) -> int:
        """Attention of all rows, each by its view's weights → [n_embd, 1, rows]."""
        outputs = []
        for view, first, count in self.shape.groups():
            weights: AttentionWeights = layer.attention[view]
            q = self._heads(weights.q, self._rows(normed, first, count), self.config.n_head, count)
            q = self._rotate(self._norm(q, weights.q_norm), first, count)
            mixed = self.attention.attend(q, index, first, count)
            width = self.config.n_head * self.config.head_dim
            outputs.append(self._multiply(weights.output, mixed, width, count))
        if len(outputs) == 1:
            return outputs[0]
        return int(self.api.concat(self.context, *outputs, 2))

    def _heads(self, weights: int, x: int, heads: int, count: int) -> int:
        """A projection of `count` rows, as [head_dim, heads, count]."""
        projected = self._multiply(weights, x, self.config.n_embd, count)
        return int(self.api.reshape_3d(self.context, projected, self.config.head_dim, heads, count))

    def _rotate(self, x: int, first: int, count: int) -> int:
        """Rotary embedding of x [head_dim, heads, count], with llama.cpp's arguments."""
        api, c, rope = self.api, self.context, self.config.rope
        rotated = api.rope_ext(
            c,
            x,
            api.view_1d(c, self.inputs.positions, count, first * _I32_BYTES),
            None,
            self.config.head_dim,
            ROPE_NEOX,
            rope.original_context or self.config.n_ctx_train,
            rope.freq_base,
            1 / rope.factor,
            rope.ext_factor,
            rope.attn_factor,
            rope.beta_fast,
            rope.beta_slow,
        )
        return int(rotated)

    def _norm(self, x: int, weight: int) -> int:
        normed = self.api.rms_norm(self.context, x, self.config.rms_eps)
        return int(self.api.mul(self.context, normed, weight))

    def _multiply(self, weights: int, x: int, columns: int, rows: int) -> int:
        return multiply_rows(self.api, self.context, weights, x, columns, rows)

    def _rows(self, x: int, first: int, count: int) -> int:
        """Rows `first` to `first + count` of x [n_embd, 1, rows]."""
        if count == self.shape.rows:
            return x
        n_embd = self.config.n_embd
        width = n_embd * _F32_BYTES
        return int(self.api.view_3d(self.context, x, n_embd, 1, count, width, width, first * width))

    def _pick(self, x: int) -> int:
        """The wanted rows of x [n_embd, 1, rows]."""
        n_embd = self.config.n_embd
        flat = self.api.reshape_2d(self.context, x, n_embd, self.shape.rows)
        picked = self.api.get_rows(self.context, flat, self.inputs.wanted)
        return self._as_rows(picked, n_embd, self.shape.wanted)

    def _as_rows(self, x: int, columns: int, rows: int) -> int:
        return int(self.api.reshape_3d(self.context, x, columns, 1, rows))
