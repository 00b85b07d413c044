"""One pass: every row through every layer, both views and all sequences together.

Rows lie AR first, then diffusion. Products with attention weights run once per view on its rows;
everything else runs once over all of them. Nothing here depends on the host but through the table
of the pass, so that a pass can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from orthrus_kernels.attention.attention import Sight
from orthrus_kernels.attention.kv_cache import Caches, KvPlanes
from orthrus_kernels.elementwise.rows import Rows
from orthrus_kernels.products.dispatch import Use
from orthrus_kernels.products.matmul import Activations
from orthrus_kernels.recurrence.states import StateMemory, States
from torch import Tensor

from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cuda.buffers import Buffers, row_range
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.delta_net import remember
from orthrus_gguf.runtime.cuda.device import Machine
from orthrus_gguf.runtime.cuda.state import HybridCudaCache, state_shape
from orthrus_gguf.runtime.cuda.tables import Table
from orthrus_gguf.runtime.cuda.weights import Layer, Product, Weights
from orthrus_gguf.runtime.protocol import View


@dataclass
class Progress:
    """How far the pass that runs has come. moved: its caches' moves are done."""

    moved: bool = False


@dataclass(frozen=True)
class PassRunner:
    """Everything that passes of one model share.

    inv_freq: radians per position [rotary_dim/2], f64; rope_scale: factor on cosine and sine.
    anchor, cache_types, held: see `kv_cache.Caches`; held_states: see `states.States`.
    """

    config: ModelConfig
    machine: Machine
    weights: Weights
    buffers: Buffers
    inv_freq: Tensor
    rope_scale: float
    anchor: Tensor
    cache_types: tuple[str, str]
    held: list[tuple[KvPlanes, KvPlanes]] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    held_states: list[StateMemory] = field(default_factory=list)

    def caches(self, table: Table) -> Caches:
        """The caches that a pass may name."""
        c = self.config
        entries = table.tensors["entries"]
        return Caches(*self.cache_types, c.n_head_kv, c.head_dim, self.anchor, entries, self.held)

    def states(self, table: Table) -> States:
        """The states that a pass may name."""
        entries = table.tensors["states"]
        return States(state_shape(self.config), self.anchor, entries, self.held_states)

    @contextmanager
    def holding(self, caches: Sequence[CudaCache]) -> Iterator[None]:
        """These are the caches of the passes that run inside."""
        self.held[:] = [cache.planes for cache in caches if cache.planes is not None]
        self.held_states[:] = [
            cache.state
            for cache in caches
            if isinstance(cache, HybridCudaCache) and cache.state is not None
        ]
        try:
            yield
        finally:
            self.held.clear()
            self.held_states.clear()

    def run(self, table: Table) -> None:
        """A pass: choices (or logits, in `buffers.logits`) of its wanted rows, and its taps."""
        b = self.buffers
        rows = table.rows(b.cos, b.sin)
        self.prepare(table, rows)
        x, partials = self.layers(table, rows)
        partials = self.taps_behind(table, x, partials)
        if table.shape.wanted:
            hidden = row_range(b.hidden, 0, table.shape.wanted)
            self.finish(x, partials, table.tensors["index"], hidden)
            self.draw(table, hidden)

    def prepare(self, table: Table, rows: Rows) -> None:
        """Move what committed trees left behind; angles of all rows."""
        launch = self.machine.kernels
        if table.shape.moves:
            layers = self.config.layer_kinds.count(LayerKind.ATTENTION)
            launch.move_columns(self.caches(table), table.tensors["moves"], layers)
        self.progress.moved = True
        launch.rotary_angles(rows, self.inv_freq, self.rope_scale)

    def layers(self, table: Table, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """The residual f32 [rows, n_embd] after all layers, and partials still to be added."""
        b, w = self.buffers, self.weights
        x = b.x[: table.shape.rows]
        self.machine.kernels.embed(
            w.embedding.table, w.embedding.type_name, rows.tokens, b.codebook, x
        )
        partials: Tensor | None = None
        for index, layer in enumerate(w.layers):
            attend = self._attend if layer.delta_net is None else self._remember
            sums = attend(table, rows, layer, index, x, partials)
            partials = self._mlp(layer, sums, x)
        return x, partials

    def _attend(
        self, table: Table, rows: Rows, layer: Layer, index: int, x: Tensor, partials: Tensor | None
    ) -> Tensor:
        """Attention's output, partials [split, rows, n_embd]."""
        launch, b, caches = self.machine.kernels, self.buffers, self.caches(table)
        total, ar = table.shape.rows, table.shape.ar
        normed = row_range(b.normed[layer.qkv[View.AR].layout], 0, total)
        launch.residual_norm(partials, x, layer.attn_norm, self.config.rms_eps, normed)
        self.tap(table, index, x)
        qkv, q = b.qkv[:, :total], b.q[:total]
        self._by_view(normed, layer.qkv, qkv, ar)
        launch.finish_qkv(
            qkv, layer.heads, rows, q, caches, layer.place, b.block_keys, b.block_values
        )
        mixed = row_range(b.mixed[layer.output[View.AR].layout], 0, total)
        launch.attention(
            q, caches, layer.place, b.block_keys, b.block_values, rows, table.tiles, b.scratch,
            mixed, qkv if layer.heads.gated else None, self.sight(layer),
        )  # fmt: skip
        sums = b.attention_sums[:, :total]
        self._by_view(mixed, layer.output, sums, ar)
        return sums

    def sight(self, layer: Layer) -> Sight | None:
        """What cuts that which rows see in a layer of attention: nothing."""
        return None

    def _remember(
        self, table: Table, rows: Rows, layer: Layer, index: int, x: Tensor, partials: Tensor | None
    ) -> Tensor:
        """A DeltaNet's output, partials [split, rows, n_embd]."""
        b, net, total, ar = self.buffers, layer.delta_net, table.shape.rows, table.shape.ar
        assert net is not None
        assert b.delta is not None
        assert b.delta_sums is not None
        first = [by_view[View.AR] for by_view in net.inputs]
        parts = [
            floats[: product.split * total * product.columns].view(product.split, total, -1)
            for floats, product in zip(b.delta_inputs, first, strict=False)
        ]
        for by_view, part in zip(net.inputs, parts, strict=True):
            normed = row_range(b.normed[by_view[View.AR].layout], 0, total)
            self.machine.kernels.residual_norm(
                partials, x, layer.attn_norm, self.config.rms_eps, normed
            )
            partials = None  # x holds their sum now
            self._by_view(normed, by_view, part, ar)
        self.tap(table, index, x)
        told = row_range(b.delta.normed[net.output[View.AR].layout], 0, total)
        remember(
            self.machine.kernels, self.config, layer, rows, table.runs, self.states(table), b.delta,
            parts, told,
        )  # fmt: skip
        sums = b.delta_sums[:, :total]
        self._by_view(told, net.output, sums, ar)
        return sums

    def tap(self, table: Table, layer: int, x: Tensor) -> None:
        """Keep the residual, if it is asked for here."""
        taps = table.shape.taps
        if layer in taps:
            table.taps(self.config.n_embd)[taps.index(layer)].copy_(x)

    def taps_behind(self, table: Table, x: Tensor, partials: Tensor | None) -> Tensor | None:
        """Taps behind the last layer, before and after the final norm; what is left to be added."""
        last, eps = self.config.n_layers, self.config.rms_eps
        if not table.shape.taps or table.shape.taps[-1] < last:
            return partials
        if partials is not None:
            x += partials.sum(0)
        self.tap(table, last, x)
        if last + 1 in table.shape.taps:
            weight = self.weights.output_norm
            normed = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
            self.tap(table, last + 1, normed)
        return None

    def finish(
        self, x: Tensor, partials: Tensor | None, index: Tensor, hidden: Activations
    ) -> None:
        """The rows of `index` as the head reads them."""
        w, eps = self.weights, self.config.rms_eps
        self.machine.kernels.residual_norm(partials, x, w.output_norm, eps, hidden, index)

    def draw(self, table: Table, hidden: Activations) -> None:
        """Choices of the wanted rows, given what the head reads of them; or, where the pass has no
        kind, their logits."""
        b, kind, count = self.buffers, table.shape.kind, table.shape.wanted
        launch = self.machine.kernels
        if kind is not None and kind.spares_logits:
            (head,) = self.weights.head.matrices
            found = launch.head_top2(hidden, head, self.machine.tile(head, count, Use.HEAD))
            launch.pick(found.values, found.tokens, table.drawn)
            return
        logits = b.logits[:count]
        self.logits(hidden, logits)
        if kind is not None:
            launch.draw(logits, table.draws, kind, b.sampling, table.drawn)

    def logits(self, hidden: Activations, out: Tensor) -> None:
        """out: f32 [rows, n_vocab], contiguous."""
        self.product(hidden, self.weights.head, out[None])

    def product(self, x: Activations, product: Product, out: Tensor) -> None:
        """Partials f32 [split, rows, columns] of rows of x, with one launch per two matrices."""
        matrices = product.matrices
        rows = out.shape[1]
        first = 0
        for index in range(0, len(matrices), 2):
            pair = matrices[index : index + 2]
            second = pair[1] if len(pair) == 2 else None
            columns = sum(matrix.rows for matrix in pair)
            tile = self.machine.tile(pair[0], rows, second=second)
            whole = columns == product.columns
            part = out if whole else out.new_empty(product.split, rows, columns)
            self.machine.kernels.matmul(x, pair[0], tile, product.split, second, part)
            if not whole:
                out[:, :, first : first + columns].copy_(part)
            first += columns

    def _by_view(
        self, x: Activations, products: Mapping[View, Product], out: Tensor, ar: int
    ) -> None:
        """Each row times its view's matrices."""
        total = out.shape[1]
        for view, start, stop in ((View.AR, 0, ar), (View.DIFFUSION, ar, total)):
            if start < stop:
                self.product(row_range(x, start, stop), products[view], out[:, start:stop])

    def _mlp(self, layer: Layer, sums: Tensor, x: Tensor) -> Tensor:
        """Add the attention's output, then the MLP; its partials [split, rows, n_embd]."""
        launch, b = self.machine.kernels, self.buffers
        total = x.shape[0]
        normed = row_range(b.normed[layer.gate_up.layout], 0, total)
        launch.residual_norm(sums, x, layer.ffn_norm, self.config.rms_eps, normed)
        gated = row_range(b.gated[layer.down.layout], 0, total)
        matrices = layer.gate_up.matrices
        if len(matrices) == 1:
            tile = self.machine.tile(matrices[0], total, Use.GATE_UP)
            launch.gate_up(normed, matrices[0], tile, gated)
        else:
            if b.gate is None or b.up is None:
                raise ValueError("separate gate and up products without buffers")
            gate, up = b.gate[:, :total], b.up[:, :total]
            for matrix, part in zip(matrices, (gate, up), strict=True):
                alone = Product((matrix,), layer.gate_up.split, layer.gate_up.layout)
                self.product(normed, alone, part)
            launch.silu_multiply(gate, up, gated)
        down = b.down[:, :total]
        self.product(gated, layer.down, down)
        return down
