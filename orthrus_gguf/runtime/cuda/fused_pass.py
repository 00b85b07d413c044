"""One fused pass: every row through every layer, both views together.

Rows lie AR first, then diffusion. Products with attention weights run once per view on its rows;
everything else runs once over all of them. Nothing here depends on the host: the launches are the
same for every length, so that a pass can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from orthrus_kernels.elementwise.activation_rows import Int8Rows
from orthrus_kernels.elementwise.rows import Rows
from orthrus_kernels.products.dispatch import Use
from orthrus_kernels.products.matmul import Activations
from torch import Tensor

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cuda.buffers import Buffers, pick_rows, row_range, some_rows
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.device import Machine
from orthrus_gguf.runtime.cuda.weights import Layer, Product, Weights
from orthrus_gguf.runtime.protocol import View


@dataclass(frozen=True)
class PassRunner:
    """Everything that passes of one model share. rope: radians per position [head_dim/2], scale."""

    config: ModelConfig
    machine: Machine
    weights: Weights
    buffers: Buffers
    inv_freq: Tensor
    rope_scale: float

    def plan(
        self,
        rows: Rows,
        state: Tensor,
        history: Tensor,
        table: Tensor,
        alternatives: Tensor,
        capacity: int,
    ) -> None:
        """Fill `rows` from a segment table, at the place where `state` stands (`rows.py`)."""
        mask = self.config.mask_token or 0
        self.machine.kernels.plan_rows(
            state, history, table, alternatives, mask, capacity, self.inv_freq, self.rope_scale,
            rows,
        )  # fmt: skip

    def run(self, rows: Rows, ar: int, cache: CudaCache) -> Activations:
        """The rows that the head reads. ar: how many of `rows` are the AR segment's (or unused)."""
        launch, b, w = self.machine.kernels, self.buffers, self.weights
        total = rows.views.shape[0]
        x = b.x[:total]
        launch.embed(w.embedding.table, w.embedding.type_name, rows.tokens, b.codebook, x)
        partials: Tensor | None = None
        for layer, (keys, values) in zip(w.layers, cache.layers, strict=True):
            normed = row_range(b.normed[layer.qkv[View.AR].layout], 0, total)
            launch.residual_norm(partials, x, layer.attn_norm, self.config.rms_eps, normed)
            qkv, q = b.qkv[:, :total], b.q[:total]
            self._by_view(normed, layer.qkv, qkv, ar)
            launch.finish_qkv(
                qkv, layer.attention_norms, self.config.rms_eps, rows, q, keys, values,
                b.block_keys, b.block_values,
            )  # fmt: skip
            mixed = row_range(b.mixed[layer.output[View.AR].layout], 0, total)
            launch.attention(
                q, keys, values, b.block_keys, b.block_values, rows.visible, rows.block_first,
                rows.block_stop, b.scratch, mixed,
            )  # fmt: skip
            sums = b.attention_sums[:, :total]
            self._by_view(mixed, layer.output, sums, ar)
            partials = self._mlp(layer, sums, x)
        hidden = row_range(b.hidden, 0, total)
        launch.residual_norm(partials, x, w.output_norm, self.config.rms_eps, hidden)
        return hidden

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


def check_rows(runner: PassRunner, rows: Rows, ar: int, cache: CudaCache) -> None:
    """Run the first `ar` rows of the pass that has just run again, one by one; compare their bits.

    Raises AssertionError with the first row whose logits differ. Leaves the pass's results as they
    were. For debugging (`machine.CHECK_ROWS`): it costs a pass per row.
    """
    hidden = runner.buffers.hidden
    total = rows.views.shape[0]
    index = torch.arange(total, device=rows.views.device)
    before = pick_rows(hidden, index)
    shape = (ar, runner.config.n_vocab)
    together = torch.empty(shape, device=rows.views.device)
    runner.logits(row_range(before, 0, ar), together)
    alone = torch.empty_like(together)
    try:
        for row in range(ar):
            single = runner.run(some_rows(rows, row, row + 1), 1, cache)
            runner.logits(single, alone[row : row + 1])
    finally:
        _restore(hidden, before)
    same = (together.view(torch.int32) == alone.view(torch.int32)).all(dim=1) | (
        rows.views[:ar] < 0
    )
    if not bool(same.all()):
        row = int((~same).int().argmax())
        difference = float((together[row] - alone[row]).abs().max())
        raise AssertionError(
            f"row {row} of a pass of {total} rows ({ar} AR) has other bits than alone: logits at "
            f"position {int(rows.positions[row])} differ by up to {difference:.3g}"
        )


def _restore(target: Activations, source: Activations) -> None:
    for kept, saved in zip(_parts(target), _parts(source), strict=True):
        kept[: saved.shape[0]].copy_(saved)


def _parts(x: Activations) -> tuple[Tensor, ...]:
    return (x.quants, x.scales, x.sums) if isinstance(x, Int8Rows) else (x,)
