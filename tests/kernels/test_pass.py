"""A whole fused pass through the small kernels and attention, against the reference runtime.

The products between the kernels are made with torch, so that this file is about everything else:
conventions of norms, rotation, views, segments, cache and scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from orthrus_kernels.attention.attention import attention, new_attention_scratch
from orthrus_kernels.attention.kv_cache import KvPlanes, new_planes
from orthrus_kernels.elementwise.activation_rows import new_f16_rows
from orthrus_kernels.elementwise.activations import deinterleave
from orthrus_kernels.elementwise.embedding import embed, iq4_codebook
from orthrus_kernels.elementwise.ops import finish_qkv, residual_norm, silu_multiply
from orthrus_kernels.elementwise.rows import AR, DIFFUSION, Rows, new_rows, plan_rows
from torch import Tensor

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import View, ar_segment, diffusion_segment
from orthrus_gguf.runtime.reference import Layer, ReferenceModel

CAPACITY, BUCKET = 64, 12


class KernelPass:
    """The reference model's weights, run with the kernels for up to BUCKET rows per pass."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        c = self.config = model.config
        self.caches = [
            (self._planes("q8_0", CAPACITY), self._planes("q8_0", CAPACITY)) for _ in model.layers
        ]
        self.scratch = new_attention_scratch(BUCKET, c.n_head, c.n_head_kv, c.head_dim, "cpu")

    def _planes(self, type_name: str, capacity: int) -> KvPlanes:
        return new_planes(type_name, self.config.n_head_kv, capacity, self.config.head_dim, "cpu")

    def run(self, position: int, tokens: list[int], table: list[list[int]]) -> Tensor:
        """Logits of all rows; `tokens` are the history."""
        c, model = self.config, self.model
        state = torch.zeros(8, dtype=torch.int32)
        state[0] = position
        history = torch.tensor([*tokens, *[0] * CAPACITY], dtype=torch.int32)
        rows, segments = new_rows(BUCKET, c.head_dim, "cpu"), torch.tensor(table).int()
        assert c.mask_token is not None
        plan_rows(
            state, history, segments, history, c.mask_token, CAPACITY, model.inv_freq,
            model.rope_scale, rows,
        )  # fmt: skip
        x = torch.empty(BUCKET, c.n_embd)
        raw = model.embedding.numpy().view(np.uint8)
        embed(torch.from_numpy(raw), "F32", rows.tokens, iq4_codebook("cpu"), x)
        down: Tensor | None = None
        for layer, caches in zip(model.layers, self.caches, strict=True):
            down = self._layer(layer, caches, rows, x, down)
        return self._normed(x, down, model.output_norm) @ model.output.T

    def _normed(self, x: Tensor, partials: Tensor | None, weight: Tensor) -> Tensor:
        out = new_f16_rows(BUCKET, self.config.n_embd, "cpu")
        residual_norm(partials, x, weight, self.config.rms_eps, out)
        return deinterleave(out, self.config.n_embd).float()

    def _by_view(self, h: Tensor, rows: Rows, weights: Callable[[View], Tensor]) -> Tensor:
        """Each row times its view's matrix, as partials of two splits."""
        half = h.shape[1] // 2
        parts = []
        for part in (slice(0, half), slice(half, None)):
            ar, block = (h[:, part] @ weights(view)[:, part].T for view in View)
            parts.append(torch.where((rows.views == DIFFUSION)[:, None], block, ar))
        return torch.stack(parts)

    def _layer(
        self,
        layer: Layer,
        caches: tuple[KvPlanes, KvPlanes],
        rows: Rows,
        x: Tensor,
        down: Tensor | None,
    ) -> Tensor:
        """One layer; returns the partials of its last product, which the next norm adds."""
        c, views = self.config, layer.attention
        h = self._normed(x, down, layer.attn_norm)
        qkv = self._by_view(
            h, rows, lambda view: torch.cat([views[view].q, views[view].k, views[view].v])
        )
        norms = torch.stack([torch.stack([views[v].q_norm, views[v].k_norm]) for v in View])
        q = torch.empty(BUCKET, c.n_head, c.head_dim, dtype=torch.float16)
        blocks = self._planes("f16", BUCKET), self._planes("f16", BUCKET)
        finish_qkv(qkv, norms, c.rms_eps, rows, q, *caches, *blocks)
        mixed = new_f16_rows(BUCKET, c.n_head * c.head_dim, "cpu")
        attention(
            q, *caches, *blocks, rows.visible, rows.block_first, rows.block_stop, self.scratch,
            mixed,
        )  # fmt: skip
        h = deinterleave(mixed, c.n_head * c.head_dim).float()
        output = self._by_view(h, rows, lambda view: views[view].output)
        h = self._normed(x, output, layer.ffn_norm)
        gated = new_f16_rows(BUCKET, c.n_ff, "cpu")
        silu_multiply((h @ layer.ffn_gate.T)[None], (h @ layer.ffn_up.T)[None], gated)
        return (deinterleave(gated, c.n_ff).float() @ layer.ffn_down.T)[None]


def test_fused_pass(demo_file: Callable[..., Path]) -> None:
    """Prompt, then verify rows and two blocks in one pass: logits within f16 of the reference."""
    with ModelFile.open(demo_file("f32")) as file:
        model = ReferenceModel(file)
    mask = model.config.mask_token
    assert mask is not None
    rng = np.random.default_rng(0)
    tokens = [int(token) for token in rng.integers(0, 200, 16)]
    kernels, cache = KernelPass(model), model.new_cache(CAPACITY)
    for start in (0, 6):
        kernels.run(start, tokens, [[AR, 0, 6, 0, -1]])
        model.forward([ar_segment(tokens[start : start + 6], start)], cache)

    found = kernels.run(12, tokens, [[AR, 0, 4, 0, -1], [1, 4, 4, 2, -1], [1, 8, 3, 1, -1]])
    wanted = model.forward(
        [
            ar_segment(tokens[12:16], 12),
            diffusion_segment(tokens[14], mask, 4, 14),
            diffusion_segment(tokens[13], mask, 3, 13),
        ],
        cache,
    )
    expected = torch.from_numpy(np.concatenate(wanted))
    error = (found[:11] - expected).pow(2).sum() / expected.pow(2).sum()
    assert error < 1e-4
    assert torch.equal(found[:11].argmax(1), expected.argmax(1))
