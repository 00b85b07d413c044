"""One forward pass as a ggml graph.

Rows run along ggml's third dimension throughout ([columns, 1, rows]); `multiply_rows` says why.
Everything but attention runs over all rows at once, or over all rows of a view; attention runs
sequence by sequence, each over its own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orthrus_gguf.ggml.binding import ROPE_ADJACENT, ROPE_HALVES, Ggml
from orthrus_gguf.ggml.tensors import multiply_rows
from orthrus_gguf.model.architectures import Pairing
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.ggml.attention import STORED_LIMIT, CachedAttention
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.input_tensors import Inputs, input_tensors
from orthrus_gguf.runtime.ggml.shape import Shape, Span
from orthrus_gguf.runtime.ggml.weights import AttentionWeights, LayerWeights, Weights

_F32_BYTES, _I32_BYTES = 4, 4

_ROPE_MODES = {Pairing.HALVES: ROPE_HALVES, Pairing.ADJACENT: ROPE_ADJACENT}

#: More tensors (views included) than one layer creates besides those of each further sequence's
#: rows of one view, than these create, and than all the rest.
TENSORS_PER_LAYER, TENSORS_PER_GROUP, OTHER_TENSORS = 128, 48, 64


@dataclass(frozen=True)
class Graph:
    """A graph that has no memory for its tensors' data yet.

    context: to free when done. logits: the output, float32 [wanted, n_vocab] in numpy's order;
    None when no row is wanted. taps: float32 [rows, n_embd] each, in the order of the shape's.
    """

    context: int
    graph: int
    inputs: Inputs
    logits: int | None
    taps: tuple[int, ...]


def tensor_count(n_layers: int, shape: Shape) -> int:
    """More tensors than the graph of a pass of this shape has."""
    further = sum(len(span.groups) - 1 for span in shape.spans())
    return (
        n_layers * (TENSORS_PER_LAYER + further * TENSORS_PER_GROUP)
        + OTHER_TENSORS
        + (8 * len(shape.shares))
    )


def build_graph(
    api: Ggml, config: ModelConfig, weights: Weights, caches: Sequence[GgmlCache], shape: Shape
) -> Graph:
    """The graph of a pass of this shape, on these caches, one per share."""
    tensors = tensor_count(config.n_layers, shape)
    headers = tensors * api.tensor_overhead() + api.graph_overhead_custom(tensors, False)
    context = api.new_context(headers + 1024)
    graph = api.new_graph_custom(context, tensors, False)
    inputs = input_tensors(api, context, caches, shape)
    attention = [
        CachedAttention(
            api,
            context,
            graph,
            cache,
            config.n_head,
            share.columns,
            own.mask,
            own.key_rows,
            own.value_rows,
        )
        for cache, share, own in zip(caches, shape.shares, inputs.shares, strict=True)
    ]
    builder = _Builder(
        api, context, graph, config, weights, shape, shape.spans(), inputs, attention, {}
    )
    logits = builder.run()
    return Graph(context, graph, inputs, logits, tuple(builder.taps[tap] for tap in shape.taps))


@dataclass(frozen=True)
class _Builder:
    """Where the operations of one graph are put together. attention: one per share.
    taps: filled on the way."""

    api: Ggml
    context: int
    graph: int
    config: ModelConfig
    weights: Weights
    shape: Shape
    spans: list[Span]
    inputs: Inputs
    attention: list[CachedAttention]
    taps: dict[int, int]

    def run(self) -> int | None:
        """All layers → logits, None when no row is wanted."""
        config, layers = self.config, self.weights.layers
        embedded = self.api.get_rows(self.context, self.weights.token_embd, self.inputs.tokens)
        self._tap(0, embedded)
        x = self._as_rows(embedded, config.n_embd, self.shape.rows)
        last = config.n_layers - 1
        for index in range(last):
            x = self._layer(x, layers[index], index)
            self._tap(index + 1, x)
        # Behind the last layer's keys and values, only rows that somebody asks about are computed.
        behind = [tap for tap in self.shape.taps if tap > last]
        if not self.shape.wanted and not behind:
            self._store(self._norm(x, layers[last].attn_norm), layers[last], last)
            return None
        x = self._layer(x, layers[last], last, only_wanted=not behind)
        self._tap(config.n_layers, x)
        if behind == [config.n_layers] and self.shape.wanted:
            x = self._pick(x)
        normed = self._norm(x, self.weights.output_norm)
        self._tap(config.n_layers + 1, normed)
        if not self.shape.wanted:
            return None
        if config.n_layers + 1 in behind:
            normed = self._pick(normed)
        logits = self._multiply(self.weights.output, normed, config.n_embd, self.shape.wanted)
        return self._out(logits)

    def _tap(self, tap: int, x: int) -> None:
        """Keep `x` as an output if somebody asks for it."""
        if tap in self.shape.taps:
            self.taps[tap] = self._out(x)

    def _out(self, x: int) -> int:
        self.api.set_output(x)
        self.api.build_forward_expand(self.graph, x)
        return x

    def _layer(self, x: int, layer: LayerWeights, index: int, *, only_wanted: bool = False) -> int:
        """x [n_embd, 1, rows] → the same after one layer, or only the wanted rows of it."""
        api, c, config, rows = self.api, self.context, self.config, self.shape.rows
        normed = self._norm(x, layer.attn_norm)
        self._store(normed, layer, index)
        mixed = self._attend(normed, layer, index)
        if only_wanted:
            x, mixed, rows = self._pick(x), self._pick(mixed), self.shape.wanted
        x = api.add(c, x, mixed)
        normed = self._norm(x, layer.ffn_norm)
        gate = self._multiply(layer.ffn_gate, normed, config.n_embd, rows)
        up = self._multiply(layer.ffn_up, normed, config.n_embd, rows)
        down = self._multiply(layer.ffn_down, api.swiglu_split(c, gate, up), config.n_ff, rows)
        return int(api.add(c, x, down))

    def _store(self, normed: int, layer: LayerWeights, index: int) -> None:
        """Keys and values of all rows → their caches, each by its view's weights."""
        heads = self.config.n_head_kv
        for span in self.spans:
            weights, x = layer.attention[span.view], self._rows(normed, span.first, span.count)
            k = self._heads(weights.k, weights.k_bias, x, heads, span.count)
            k = self._clamped(self._placed(k, weights.k_norm, span))
            v = self._clamped(self._heads(weights.v, weights.v_bias, x, heads, span.count))
            for group in span.groups:
                own_k, own_v = (
                    self._of_group(a, heads, group.first, group.count, span.count) for a in (k, v)
                )
                count, stored = group.count, self.inputs.shares[group.share].stored
                if stored is not None:
                    stores = self.shape.shares[group.share].stores
                    own_k, own_v = (self._repeat(a, count, stored, stores) for a in (own_k, own_v))
                    count = stores
                self.attention[group.share].store(own_k, own_v, index, group.own_first, count)

    def _repeat(self, x: int, rows: int, stored: int, stores: int) -> int:
        """x [head_dim, n_head_kv, rows] of a tree → the rows to store, [head_dim, n_head_kv,
        stores]."""
        api, c, config = self.api, self.context, self.config
        flat = api.reshape_2d(c, x, config.head_dim * config.n_head_kv, rows)
        picked = api.get_rows(c, flat, stored)
        return int(api.reshape_3d(c, picked, config.head_dim, config.n_head_kv, stores))

    def _attend(self, normed: int, layer: LayerWeights, index: int) -> int:
        """Attention of all rows, each by its view's weights → [n_embd, 1, rows]."""
        config = self.config
        heads, width, outputs = config.n_head, config.n_head * config.head_dim, []
        for span in self.spans:
            weights: AttentionWeights = layer.attention[span.view]
            x = self._rows(normed, span.first, span.count)
            q = self._heads(weights.q, weights.q_bias, x, heads, span.count)
            q = self._placed(q, weights.q_norm, span)
            parts = []
            for group in span.groups:
                own = self._of_group(q, heads, group.first, group.count, span.count)
                attention = self.attention[group.share]
                mixed = attention.attend(own, index, group.own_first, group.count)
                if len(span.groups) > 1:
                    mixed = self._as_rows(mixed, width, group.count)
                parts.append(mixed)
            outputs.append(self._multiply(weights.output, self._joined(parts), width, span.count))
        return self._joined(outputs)

    def _joined(self, parts: Sequence[int]) -> int:
        """[columns, 1, rows] of all parts, in order. Halves first: each row is copied few times."""
        if len(parts) == 1:
            return parts[0]
        half = len(parts) // 2
        first, second = self._joined(parts[:half]), self._joined(parts[half:])
        return int(self.api.concat(self.context, first, second, 2))

    def _heads(self, weights: int, bias: int | None, x: int, heads: int, count: int) -> int:
        """A projection of `count` rows, as [head_dim, heads, count]."""
        projected = self._multiply(weights, x, self.config.n_embd, count)
        if bias is not None:
            projected = self.api.add(self.context, projected, bias)
        return int(self.api.reshape_3d(self.context, projected, self.config.head_dim, heads, count))

    def _placed(self, x: int, norm: int | None, span: Span) -> int:
        """x [head_dim, heads, count], normed where the architecture has it, and rotated, with
        llama.cpp's arguments."""
        api, c, rope = self.api, self.context, self.config.rope
        rotated = api.rope_ext(
            c,
            x if norm is None else self._norm(x, norm),
            api.view_1d(c, self.inputs.positions, span.count, span.first * _I32_BYTES),
            self.weights.freq_factors,
            self.config.head_dim,
            _ROPE_MODES[self.config.architecture.pairing],
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

    def _clamped(self, x: int) -> int:
        return int(self.api.clamp(self.context, x, -STORED_LIMIT, STORED_LIMIT))

    def _multiply(self, weights: int, x: int, columns: int, rows: int) -> int:
        return multiply_rows(self.api, self.context, weights, x, columns, rows)

    def _rows(self, x: int, first: int, count: int) -> int:
        """Rows `first` to `first + count` of x [n_embd, 1, rows]."""
        if count == self.shape.rows:
            return x
        n_embd = self.config.n_embd
        width = n_embd * _F32_BYTES
        return int(self.api.view_3d(self.context, x, n_embd, 1, count, width, width, first * width))

    def _of_group(self, x: int, heads: int, first: int, count: int, total: int) -> int:
        """Rows `first` to `first + count` of x [head_dim, heads, total]."""
        if count == total:
            return x
        size = self.config.head_dim
        row, head = heads * size * _F32_BYTES, size * _F32_BYTES
        return int(self.api.view_3d(self.context, x, size, heads, count, head, row, first * row))

    def _pick(self, x: int) -> int:
        """The wanted rows of x [n_embd, 1, rows]."""
        if self.inputs.wanted is None:
            return x
        n_embd = self.config.n_embd
        flat = self.api.reshape_2d(self.context, x, n_embd, self.shape.rows)
        picked = self.api.get_rows(self.context, flat, self.inputs.wanted)
        return self._as_rows(picked, n_embd, self.shape.wanted)

    def _as_rows(self, x: int, columns: int, rows: int) -> int:
        return int(self.api.reshape_3d(self.context, x, columns, 1, rows))
