"""A pass of many AR rows: weights to fp16 once, then dense products by the vendor's library.

Its sums differ in their last bits from those of fused passes (`orthrus_kernels.products.dequantize`),
which is fine for prompts: they are processed alike whatever the strategy.
"""

from __future__ import annotations

import torch
from orthrus_kernels.elementwise.activation_rows import new_f16_rows
from orthrus_kernels.elementwise.activations import deinterleave
from orthrus_kernels.elementwise.rows import Rows, new_rows
from orthrus_kernels.packing.pack import PAIR_ROWS
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, Layout, QuantTensor
from torch import Tensor

from orthrus_gguf.runtime.cuda.buffers import pass_rows, row_range
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.fused_pass import PassRunner
from orthrus_gguf.runtime.cuda.weights import Layer, Product
from orthrus_gguf.runtime.protocol import View


def run_prompt(runner: PassRunner, rows: Rows, cache: CudaCache) -> tuple[Tensor, Tensor | None]:
    """All layers. Returns the residual f32 [rows, n_embd] and what `finish_prompt` adds to it."""
    launch, b, c = runner.machine.kernels, runner.buffers, runner.config
    count, device = rows.views.shape[0], rows.views.device
    dense = torch.empty(dense_numbers(runner), dtype=torch.float16, device=device)
    x = torch.empty(count, c.n_embd, device=device)
    normed = new_f16_rows(count, c.n_embd, device)
    mixed = new_f16_rows(count, c.n_head * c.head_dim, device)
    gated = new_f16_rows(count, c.n_ff, device)
    q = torch.empty(count, c.n_head, c.head_dim, dtype=torch.float16, device=device)
    embedding = runner.weights.embedding
    launch.embed(embedding.table, embedding.type_name, rows.tokens, b.codebook, x)
    partials: Tensor | None = None
    for layer, (keys, values) in zip(runner.weights.layers, cache.layers, strict=True):
        launch.residual_norm(partials, x, layer.attn_norm, c.rms_eps, normed)
        qkv = _product(runner, normed, layer.qkv[View.AR], dense)
        launch.finish_qkv(
            qkv, layer.attention_norms, c.rms_eps, rows, q, keys, values, b.block_keys,
            b.block_values,
        )  # fmt: skip
        launch.attention(
            q, keys, values, b.block_keys, b.block_values, rows.visible, rows.block_first,
            rows.block_stop, b.scratch, mixed,
        )  # fmt: skip
        sums = _product(runner, mixed, layer.output[View.AR], dense)
        launch.residual_norm(sums, x, layer.ffn_norm, c.rms_eps, normed)
        launch.silu_multiply(*_gate_up(runner, normed, layer, dense), gated)
        partials = _product(runner, gated, layer.down, dense)
    return x, partials


def prompt_rows_of(runner: PassRunner, count: int) -> Rows:
    """Rows for `PassRunner.plan` to fill."""
    return new_rows(count, runner.config.head_dim, runner.machine.device)


def dense_numbers(runner: PassRunner) -> int:
    """Size of the fp16 scratch: the largest matrix of a layer."""
    products = [part for part in runner.weights.products() if part is not runner.weights.head]
    return max(m.rows * m.padded_k for part in products for m in part.matrices)


def finish_prompt(
    runner: PassRunner, x: Tensor, partials: Tensor | None, wanted: range, out: Tensor
) -> None:
    """Logits of the wanted rows → out f32 [len(wanted), n_vocab], with the head's fused product."""
    b, limit = runner.buffers, pass_rows(runner.config)
    for start in range(wanted.start, wanted.stop, limit):
        stop = min(start + limit, wanted.stop)
        hidden = row_range(b.hidden, 0, stop - start)
        some = None if partials is None else partials[:, start:stop]
        runner.machine.kernels.residual_norm(
            some, x[start:stop], runner.weights.output_norm, runner.config.rms_eps, hidden
        )
        logits = b.logits[: stop - start]
        runner.logits(hidden, logits)
        if out.data_ptr() != logits.data_ptr():
            out[start - wanted.start : stop - wanted.start].copy_(logits)


def _product(runner: PassRunner, x: Tensor, product: Product, dense: Tensor) -> Tensor:
    """f32 [1, rows, columns]. x: interleaved f16 rows."""
    parts = [_dense(runner, x, matrix, dense) for matrix in product.matrices]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[None]


def _dense(runner: PassRunner, x: Tensor, matrix: QuantTensor, dense: Tensor) -> Tensor:
    if matrix.layout is Layout.A8 and matrix.type not in PLAIN_TYPES:
        # These weights keep their natural order; rows are stored interleaved.
        natural = deinterleave(x, matrix.k)
        x = torch.nn.functional.pad(natural, (0, matrix.padded_k - matrix.k)).contiguous()
    result: Tensor = runner.machine.kernels.prompt_matmul(x, matrix, dense)
    return result


def _gate_up(
    runner: PassRunner, normed: Tensor, layer: Layer, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """gate and up, f32 [1, rows, n_ff] each."""
    matrices = layer.gate_up.matrices
    if len(matrices) == 2:
        gate, up = (_dense(runner, normed, matrix, dense)[None] for matrix in matrices)
        return gate, up
    both = _dense(runner, normed, matrices[0], dense)
    pairs = both.view(both.shape[0], -1, 2, PAIR_ROWS)
    gate, up = (pairs[:, :, index].reshape(1, both.shape[0], -1) for index in range(2))
    return gate, up
