"""A whole fused pass through the small kernels and attention, against the reference runtime.

The products between the kernels are made with torch, so that this file is about everything else:
conventions of norms, rotation, views, segments, cache and scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from orthrus_kernels.attention.attention import (
    Run,
    Tiles,
    attention,
    new_attention_scratch,
    tile_entries,
)
from orthrus_kernels.attention.finish_qkv import HeadWeights, finish_qkv
from orthrus_kernels.attention.kv_cache import Caches, cache_entry, new_planes
from orthrus_kernels.elementwise.activation_rows import new_f16_rows
from orthrus_kernels.elementwise.activations import deinterleave
from orthrus_kernels.elementwise.embedding import embed, iq4_codebook
from orthrus_kernels.elementwise.ops import residual_norm, silu_multiply
from orthrus_kernels.elementwise.rows import AR, DIFFUSION, Rows, rotary_angles
from pass_rows import rows_of
from torch import Tensor

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.rope import frequencies
from orthrus_gguf.runtime.protocol import OWN_VIEWS, View, ar_segment, diffusion_segment
from orthrus_gguf.runtime.reference import Layer, ReferenceModel

CAPACITY, BUCKET = 64, 12

Table = list[tuple[int, int, int, list[int]]]
"""View, first row, position, tokens of some rows."""


class KernelPass:
    """The reference model's weights, run with the kernels for up to BUCKET rows per pass, on the
    second of two sequences."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        c = self.config = model.config
        planes = [
            new_planes("q8_0", c.n_head_kv, capacity, c.head_dim, "cpu", c.n_layers)
            for capacity in (16, 16, CAPACITY, CAPACITY)
        ]
        held = [(planes[0], planes[1]), (planes[2], planes[3])]
        anchor = torch.zeros(64, dtype=torch.uint8)
        entries = torch.tensor([cache_entry(*pair, anchor) for pair in held])
        self.caches = Caches("q8_0", "q8_0", c.n_head_kv, c.head_dim, anchor, entries, held)
        self.scratch = new_attention_scratch(BUCKET, c.n_head, c.n_head_kv, c.head_dim, "cpu")
        group = c.n_head // c.n_head_kv
        tiles = tile_entries([Run(0, BUCKET, 1)], group, c.head_dim)
        self.tiles = Tiles(torch.tensor(tiles, dtype=torch.int32), ((0, BUCKET, 0, len(tiles)),))
        keys, values = (new_planes("f16", c.n_head_kv, BUCKET, c.head_dim, "cpu") for _ in range(2))
        self.blocks = keys, values

    def rows(self, table: Table) -> Rows:
        """What the host would say of them, and their angles."""
        names = ("views", "tokens", "positions", "visible", "block_first", "block_stop", "places")
        columns = {name: [0] * BUCKET for name in names}
        columns["views"] = [-1] * BUCKET
        for view, first, position, tokens in table:
            for i, token in enumerate(tokens):
                row, at = first + i, position + i
                columns["views"][row], columns["tokens"][row] = view, token
                columns["positions"][row] = columns["places"][row] = at
                columns["visible"][row] = at + 1 if view == AR else position
                if view == DIFFUSION:
                    columns["block_first"][row] = first
                    columns["block_stop"][row] = first + len(tokens)
        sequences = [1] * BUCKET
        rows = rows_of(BUCKET, head_dim=self.config.head_dim, sequences=sequences, **columns)
        numbers, scale = frequencies(self.config.rope, self.config.head_dim)
        rotary_angles(rows, torch.from_numpy(numbers), scale)
        return rows

    def run(self, table: Table) -> Tensor:
        """Logits of all rows."""
        c, model, rows = self.config, self.model, self.rows(table)
        x = torch.empty(BUCKET, c.n_embd)
        raw = model.embedding.numpy().view(np.uint8)
        embed(torch.from_numpy(raw), "F32", rows.tokens, iq4_codebook("cpu"), x)
        down: Tensor | None = None
        for index, layer in enumerate(model.layers):
            down = self._layer(layer, index, rows, x, down)
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
            ar, block = (h[:, part] @ weights(view)[:, part].T for view in OWN_VIEWS)
            parts.append(torch.where((rows.views == DIFFUSION)[:, None], block, ar))
        return torch.stack(parts)

    def _layer(
        self, layer: Layer, index: int, rows: Rows, x: Tensor, down: Tensor | None
    ) -> Tensor:
        """One layer; returns the partials of its last product, which the next norm adds."""
        c, views = self.config, layer.attention
        h = self._normed(x, down, layer.attn_norm)
        qkv = self._by_view(
            h, rows, lambda view: torch.cat([views[view].q, views[view].k, views[view].v])
        )
        norms = torch.stack([self._norms(layer, view) for view in OWN_VIEWS])
        q = torch.empty(BUCKET, c.n_head, c.head_dim, dtype=torch.float16)
        heads = HeadWeights(norms, None, False, c.rms_eps)
        finish_qkv(qkv, heads, rows, q, self.caches, index, *self.blocks)
        mixed = new_f16_rows(BUCKET, c.n_head * c.head_dim, "cpu")
        attention(q, self.caches, index, *self.blocks, rows, self.tiles, self.scratch, mixed)
        h = deinterleave(mixed, c.n_head * c.head_dim).float()
        output = self._by_view(h, rows, lambda view: views[view].output)
        h = self._normed(x, output, layer.ffn_norm)
        gated = new_f16_rows(BUCKET, c.n_ff, "cpu")
        silu_multiply((h @ layer.ffn_gate.T)[None], (h @ layer.ffn_up.T)[None], gated)
        return (deinterleave(gated, c.n_ff).float() @ layer.ffn_down.T)[None]

    def _norms(self, layer: Layer, view: View) -> Tensor:
        weights = layer.attention[view]
        assert weights.q_norm is not None
        assert weights.k_norm is not None
        return torch.stack([weights.q_norm, weights.k_norm])


def test_mixed_pass(demo_file: Callable[..., Path]) -> None:
    """Prompt, then verify rows and two blocks in one pass: logits within f16 of the reference. Two
    of the demo model's layers: each takes seconds in the interpreter."""
    with ModelFile.open(demo_file("f32")) as file:
        model = ReferenceModel(file)
    model.config, model.layers = replace(model.config, n_layers=2), model.layers[:2]
    mask = model.config.mask_token
    assert mask is not None
    rng = np.random.default_rng(0)
    tokens = [int(token) for token in rng.integers(0, 200, 16)]
    kernels, cache = KernelPass(model), model.new_cache(CAPACITY)
    kernels.run([(AR, 0, 0, tokens[:12])])
    model.logits([ar_segment(cache, tokens[:12], 0)])
    cache.commit(range(12))

    found = kernels.run(
        [
            (AR, 0, 12, tokens[12:16]),
            (DIFFUSION, 4, 14, [tokens[14], *[mask] * 3]),
            (DIFFUSION, 8, 13, [tokens[13], *[mask] * 2]),
        ]
    )
    wanted = model.logits(
        [
            ar_segment(cache, tokens[12:16], 12),
            diffusion_segment(cache, tokens[14], mask, 4, 14),
            diffusion_segment(cache, tokens[13], mask, 3, 13),
        ]
    )
    expected = torch.from_numpy(np.concatenate(wanted))
    error = (found[:11] - expected).pow(2).sum() / expected.pow(2).sum()
    assert error < 1e-4
    assert torch.equal(found[:11].argmax(1), expected.argmax(1))
