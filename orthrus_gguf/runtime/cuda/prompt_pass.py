"""A pass of many AR rows: weights to fp16 once, then dense products by the vendor's library.

Its sums differ in their last bits from those of other passes (`products.dequantize`), which is
fine for prompts: they are processed alike whatever the strategy.

It is launched kernel by kernel, not as a graph: a graph would keep these buffers for good, for each
length that a prompt's last pass may have, and so many rows keep a card busy for longer than their
few launches take (kernels/LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from orthrus_kernels.elementwise.activation_rows import new_f16_rows
from orthrus_kernels.elementwise.activations import deinterleave
from orthrus_kernels.elementwise.rows import Rows, new_angles
from orthrus_kernels.packing.pack import PAIR_ROWS
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, Layout
from torch import Tensor

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cuda.buffers import new_rows, pass_rows, row_range
from orthrus_gguf.runtime.cuda.delta_net import DeltaBuffers, new_delta_buffers, remember
from orthrus_gguf.runtime.cuda.runner import PassRunner
from orthrus_gguf.runtime.cuda.tables import Table
from orthrus_gguf.runtime.cuda.weights import DeltaNet, Layer, Product, Weights
from orthrus_gguf.runtime.protocol import View


@dataclass(frozen=True)
class PromptBuffers:
    """What a prompt pass of some rows works in, allocated for the pass.

    dense: f16, the largest matrix of a layer. product: f32 [1, rows, columns], of the widest
    product. narrow: f32 [1, rows, n_embd], what the next norm adds. delta, gates: of DeltaNets; the
    gates f32 [1, rows, 2 value heads].
    """

    dense: Tensor
    cos: Tensor
    sin: Tensor
    x: Tensor
    normed: Tensor
    mixed: Tensor
    gated: Tensor
    q: Tensor
    product: Tensor
    narrow: Tensor
    delta: DeltaBuffers | None = None
    gates: Tensor | None = None


def new_prompt_buffers(
    config: ModelConfig, weights: Weights, rows: int, device: torch.device
) -> PromptBuffers:
    """Uninitialised, but for the padding of activations."""
    c = config
    heads = c.n_head * c.head_dim
    products = [part for part in weights.products() if part is not weights.head]
    matrices = [matrix for part in products for matrix in part.matrices]
    widest = max(part.columns for part in products)
    cos, sin = new_angles(rows, c.rotary_dim, device)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device)

    def halves(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float16, device=device)

    return PromptBuffers(
        dense=halves(max(matrix.rows * matrix.padded_k for matrix in matrices)),
        cos=cos,
        sin=sin,
        x=numbers(rows, c.n_embd),
        normed=new_f16_rows(rows, c.n_embd, device),
        mixed=new_f16_rows(rows, heads, device),
        gated=new_f16_rows(rows, c.n_ff, device),
        q=halves(rows, c.n_head, c.head_dim),
        product=numbers(rows * widest),
        narrow=numbers(1, rows, c.n_embd),
        delta=new_delta_buffers(c, rows, device, {Layout.A16}, new_rows),
        gates=numbers(1, rows, 2 * c.hybrid.n_value_heads) if c.hybrid else None,
    )


def run_prompt(runner: PassRunner, table: Table, logits: Tensor | None) -> None:
    """A pass of AR rows of one sequence: its choices, or the logits of its wanted rows → `logits`
    [wanted, n_vocab]; and its taps."""
    launch, c, count = runner.machine.kernels, runner.config, table.shape.rows
    w = runner.weights
    b = new_prompt_buffers(c, w, count, runner.machine.device)
    rows = table.rows(b.cos, b.sin)
    runner.prepare(table, rows)
    static = runner.buffers
    launch.embed(w.embedding.table, w.embedding.type_name, rows.tokens, static.codebook, b.x)
    partials: Tensor | None = None
    for index, layer in enumerate(w.layers):
        launch.residual_norm(partials, b.x, layer.attn_norm, c.rms_eps, b.normed)
        runner.tap(table, index, b.x)
        if layer.delta_net is None:
            sums = _attend(runner, table, b, rows, layer)
        else:
            sums = _remember(runner, table, b, rows, layer, layer.delta_net)
        launch.residual_norm(sums, b.x, layer.ffn_norm, c.rms_eps, b.normed)
        _gate_up(runner, b, layer)
        partials = _product(runner, b, b.gated, layer.down, b.narrow)
    partials = runner.taps_behind(table, b.x, partials)
    most, index_of = pass_rows(c), table.tensors["index"]
    for start in range(0, table.shape.wanted, most):
        stop = min(start + most, table.shape.wanted)
        hidden = row_range(static.hidden, 0, stop - start)
        runner.finish(b.x, partials, index_of[start:stop], hidden)
        if logits is None:
            runner.draw(table, hidden)
        else:
            some = static.logits[: stop - start]
            runner.logits(hidden, some)
            logits[start:stop].copy_(some)


def _attend(runner: PassRunner, table: Table, b: PromptBuffers, rows: Rows, layer: Layer) -> Tensor:
    """Attention's output, until the next product."""
    launch, static, caches = runner.machine.kernels, runner.buffers, runner.caches(table)
    blocks = static.block_keys, static.block_values
    qkv = _product(runner, b, b.normed, layer.qkv[View.AR])
    launch.finish_qkv(qkv, layer.heads, rows, b.q, caches, layer.place, *blocks)
    launch.attention(
        b.q, caches, layer.place, *blocks, rows, table.tiles, static.scratch, b.mixed,
        qkv if layer.heads.gated else None,
    )  # fmt: skip
    return _product(runner, b, b.mixed, layer.output[View.AR])


def _remember(
    runner: PassRunner, table: Table, b: PromptBuffers, rows: Rows, layer: Layer, net: DeltaNet
) -> Tensor:
    """A DeltaNet's output, until the next product."""
    assert b.delta is not None
    parts = [
        _product(runner, b, b.normed, by_view[View.AR], out)
        for by_view, out in zip(net.inputs, (None, b.gates), strict=False)
    ]
    told = b.delta.normed[Layout.A16]
    assert isinstance(told, Tensor)
    remember(
        runner.machine.kernels, runner.config, layer, rows, table.runs, runner.states(table),
        b.delta, parts, told,
    )  # fmt: skip
    return _product(runner, b, told, net.output[View.AR])


def _product(
    runner: PassRunner, b: PromptBuffers, x: Tensor, product: Product, out: Tensor | None = None
) -> Tensor:
    """f32 [1, rows, columns]: `out`, or else until the next product. x: interleaved f16 rows."""
    if out is None:
        out = b.product[: x.shape[0] * product.columns].view(1, x.shape[0], product.columns)
    first, natural = 0, None
    for matrix in product.matrices:
        part = out[0, :, first : first + matrix.rows]
        rows = x
        if matrix.layout is Layout.A8 and matrix.type not in PLAIN_TYPES:
            # These weights keep their natural order.
            natural = deinterleave(x, matrix.padded_k) if natural is None else natural
            rows = natural
        runner.machine.kernels.prompt_matmul(rows, matrix, b.dense, part)
        first += matrix.rows
    return out


def _gate_up(runner: PassRunner, b: PromptBuffers, layer: Layer) -> None:
    """silu(gate) * up → b.gated."""
    both = _product(runner, b, b.normed, layer.gate_up)
    if len(layer.gate_up.matrices) == 1:
        runner.machine.kernels.silu_multiply(both, both, b.gated, paired=PAIR_ROWS)
    else:
        gate, up = both.chunk(2, dim=2)
        runner.machine.kernels.silu_multiply(gate, up, b.gated)
