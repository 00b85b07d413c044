"""A pass of many AR rows: weights to fp16 once, then dense products by the vendor's library.

Its sums differ in their last bits from those of other passes (`products.dequantize`), which is
fine for prompts: they are processed alike whatever the strategy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from orthrus_kernels.elementwise.activation_rows import new_f16_rows
from orthrus_kernels.elementwise.activations import deinterleave
from orthrus_kernels.elementwise.rows import new_angles
from orthrus_kernels.packing.pack import PAIR_ROWS
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, Layout, QuantTensor
from torch import Tensor

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cuda.buffers import pass_rows, row_range
from orthrus_gguf.runtime.cuda.runner import PassRunner
from orthrus_gguf.runtime.cuda.tables import Table
from orthrus_gguf.runtime.cuda.weights import Layer, Product, Weights
from orthrus_gguf.runtime.protocol import View


@dataclass(frozen=True)
class PromptBuffers:
    """What a prompt pass of some rows works in, allocated for the pass.

    dense: f16, the largest matrix of a layer. product: f32 [1, rows, columns], of the widest
    product; half: the same rounded, of the widest matrix.
    gate, up: f32 [1, rows, n_ff]. narrow: f32 [1, rows, n_embd].
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
    half: Tensor
    gate: Tensor
    up: Tensor
    narrow: Tensor


def new_prompt_buffers(
    config: ModelConfig, weights: Weights, rows: int, device: torch.device
) -> PromptBuffers:
    """Uninitialised, but for the padding of activations."""
    c = config
    heads = c.n_head * c.head_dim
    products = [part for part in weights.products() if part is not weights.head]
    matrices = [matrix for part in products for matrix in part.matrices]
    widest = max(part.columns for part in products)
    cos, sin = new_angles(rows, c.head_dim, device)

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
        half=halves(rows * max(matrix.rows for matrix in matrices)),
        gate=numbers(1, rows, c.n_ff),
        up=numbers(1, rows, c.n_ff),
        narrow=numbers(1, rows, c.n_embd),
    )


def run_prompt(runner: PassRunner, table: Table, logits: Tensor | None) -> None:
    """A pass of AR rows of one sequence: its choices, or the logits of its wanted rows → `logits`
    [wanted, n_vocab]; and its taps."""
    launch, c, count = runner.machine.kernels, runner.config, table.shape.rows
    w = runner.weights
    b = new_prompt_buffers(c, w, count, runner.machine.device)
    rows = table.rows(b.cos, b.sin)
    runner.prepare(table, rows)
    caches, tiles, static = runner.caches(table), table.tiles, runner.buffers
    launch.embed(w.embedding.table, w.embedding.type_name, rows.tokens, static.codebook, b.x)
    partials: Tensor | None = None
    for index, layer in enumerate(w.layers):
        launch.residual_norm(partials, b.x, layer.attn_norm, c.rms_eps, b.normed)
        runner.tap(table, index, b.x)
        qkv = _product(runner, b, b.normed, layer.qkv[View.AR])
        launch.finish_qkv(
            qkv, layer.heads, rows, b.q, caches, index, static.block_keys, static.block_values
        )
        launch.attention(
            b.q, caches, index, static.block_keys, static.block_values, rows, tiles,
            static.scratch, b.mixed,
        )  # fmt: skip
        sums = _product(runner, b, b.mixed, layer.output[View.AR])
        launch.residual_norm(sums, b.x, layer.ffn_norm, c.rms_eps, b.normed)
        _gate_up(runner, b, layer)
        launch.silu_multiply(b.gate, b.up, b.gated)
        partials = b.narrow.copy_(_product(runner, b, b.gated, layer.down))
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


def _product(runner: PassRunner, b: PromptBuffers, x: Tensor, product: Product) -> Tensor:
    """f32 [1, rows, columns], until the next product. x: interleaved f16 rows."""
    out = b.product[: x.shape[0] * product.columns].view(1, x.shape[0], product.columns)
    first = 0
    for matrix in product.matrices:
        _dense(runner, b, x, matrix, out[0, :, first : first + matrix.rows])
        first += matrix.rows
    return out


def _dense(
    runner: PassRunner, b: PromptBuffers, x: Tensor, matrix: QuantTensor, out: Tensor
) -> None:
    if matrix.layout is Layout.A8 and matrix.type not in PLAIN_TYPES:
        # These weights keep their natural order; rows are stored interleaved.
        natural = deinterleave(x, matrix.k)
        x = torch.nn.functional.pad(natural, (0, matrix.padded_k - matrix.k)).contiguous()
    half = b.half[: out.numel()].view(out.shape)
    runner.machine.kernels.prompt_matmul(x, matrix, b.dense, half, out)


def _gate_up(runner: PassRunner, b: PromptBuffers, layer: Layer) -> None:
    """The products with gate and up → b.gate, b.up."""
    matrices = layer.gate_up.matrices
    if len(matrices) == 2:
        for matrix, out in zip(matrices, (b.gate, b.up), strict=True):
            _dense(runner, b, b.normed, matrix, out[0])
        return
    both = _product(runner, b, b.normed, layer.gate_up)[0]
    pairs = both.view(both.shape[0], -1, 2, PAIR_ROWS)
    for index, out in enumerate((b.gate, b.up)):
        out[0].view(out.shape[1], -1, PAIR_ROWS).copy_(pairs[:, :, index])
