"""Gated DeltaNet in torch, for texts and for blocks on them: the recurrence in closed form, so that
rows need not wait for one another (Yang et al. 2025, arXiv 2412.06464).

With G the running sum of the logarithms of the decays, a state S_0 and rows behind it,

    S_t = e^G_t S_0 + sum over s <= t of e^(G_t - G_s) k_s delta_s^T

where the deltas solve a triangular system, since each depends on those before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from orthrus_gguf.model.hybrid import CONV_KERNEL, Hybrid
from orthrus_gguf.runtime.reference_hybrid import L2_EPS, DeltaNet

#: Rows of a text that are solved for together.
CHUNK = 64

BACK = CONV_KERNEL - 1


@dataclass(frozen=True)
class Updates:
    """What rows do to a state, in float32: all that must be kept to know it before any of them.

    keys: [batch, key heads, rows, head_dim]. deltas: [batch, value heads, rows, head_dim].
    decays: their logarithms [batch, value heads, rows, 1]. rows: before the convolution
    [batch, 1, rows, channels].
    """

    keys: Tensor
    deltas: Tensor
    decays: Tensor
    rows: Tensor

    def before(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rows before each of the anchors [batch, blocks]: the state
        [batch, blocks, value heads, head_dim, head_dim], and the last ones for the convolution to
        look back on [batch, blocks, BACK, channels]."""
        total = self.decays[..., 0].cumsum(-1)  # [batch, value heads, rows]
        at = torch.arange(total.shape[-1], device=anchors.device)
        seen = (at < anchors[..., None])[:, :, None]  # [batch, blocks, 1, rows]
        last = (anchors - 1).clamp(min=0)[:, None].expand(-1, total.shape[1], -1)
        since = total.gather(-1, last).transpose(1, 2)[..., None] - total[:, None]
        weights = since.masked_fill(~seen, -math.inf).exp()
        keys = self.keys.repeat(1, total.shape[1] // self.keys.shape[1], 1, 1)
        # One block after the other: products with all deltas at once would be many times as large.
        states = [
            keys.transpose(-1, -2) @ (weights[:, block, ..., None] * self.deltas)
            for block in range(anchors.shape[1])
        ]
        back = anchors[..., None] + torch.arange(-BACK, 0, device=anchors.device)
        index = back.clamp(min=0).flatten(1)[..., None]
        rows = self.rows[:, 0].gather(1, index.expand(-1, -1, self.rows.shape[-1]))
        rows = rows.view(*back.shape, -1) * (back >= 0)[..., None]
        return torch.stack(states, dim=1), rows


@dataclass(frozen=True)
class Rows:
    """What the recurrence takes of rows, by value head, in float32.

    q, k, v: [batch, heads, rows, head_dim]. beta, decay (its logarithm): [batch, heads, rows].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor

    def some(self, rows: slice) -> Rows:
        """Those rows alone."""
        return Rows(*(getattr(self, field.name)[:, :, rows] for field in fields(self)))


def rule(rows: Rows, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What rows read, [batch, heads, rows, head_dim], their deltas, and the state behind them.

    state: before the rows, [batch, heads, head_dim, head_dim].
    """
    q, k, v, beta = rows.q, rows.k, rows.v, rows.beta
    total = rows.decay.cumsum(-1)
    count = total.shape[-1]
    earlier = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
    faded = (total[..., :, None] - total[..., None, :]).masked_fill(~earlier, -math.inf).exp()
    begun = total.exp()[..., None]
    own = (beta[..., None] * faded * (k @ k.transpose(-1, -2))).tril(-1)
    eye = torch.eye(count, device=q.device)
    wanted = beta[..., None] * (v - begun * (k @ state))
    deltas = torch.linalg.solve_triangular(own + eye, wanted, upper=False, unitriangular=True)
    read = begun * (q @ state) + (faded * (q @ k.transpose(-1, -2))) @ deltas
    left = faded[..., -1, :, None] * k  # what is left of each key at the end
    behind = begun[..., -1:, :] * state + left.transpose(-1, -2) @ deltas
    return read, deltas, behind


def read(h: Tensor, w: DeltaNet, hybrid: Hybrid, eps: float) -> tuple[Tensor, Updates]:
    """What texts of normed rows h [batch, rows, n_embd] get from a DeltaNet, and what they do to
    its state, which is empty before them."""
    nothing = h.new_zeros(len(h), BACK, hybrid.channels, dtype=torch.float32)
    raw, rows = _inputs(h, w, hybrid, nothing)
    size = hybrid.head_dim
    state = raw.new_zeros(len(h), hybrid.n_value_heads, size, size)
    found, deltas = [], []
    for first in range(0, h.shape[1], CHUNK):
        told, delta, state = rule(rows.some(slice(first, first + CHUNK)), state)
        found.append(told)
        deltas.append(delta)
    out = _outputs(torch.cat(found, dim=2), h, w, eps)
    keys = rows.k[:, : hybrid.n_key_heads]
    return out, Updates(keys, torch.cat(deltas, dim=2), rows.decay[..., None], raw[:, None])


def draft(
    h: Tensor, w: DeltaNet, hybrid: Hybrid, eps: float, state: Tensor, before: Tensor
) -> Tensor:
    """What blocks of normed rows h [blocks, rows, n_embd] get. state, before: of the rows before
    each (`Updates.before`), over all blocks."""
    _, rows = _inputs(h, w, hybrid, before)
    told, _, _ = rule(rows, state)
    return _outputs(told, h, w, eps)


def _inputs(h: Tensor, w: DeltaNet, hybrid: Hybrid, before: Tensor) -> tuple[Tensor, Rows]:
    """Of rows behind those `before` [batch, BACK, channels]: themselves before the convolution
    [batch, rows, channels], and what becomes of them."""
    rows = F.linear(h, w.qkv).float()
    around = torch.cat([before, rows], dim=1)
    count, size, groups = h.shape[1], hybrid.head_dim, hybrid.n_key_heads
    taps = [around[:, i : i + count] * w.conv[:, i] for i in range(CONV_KERNEL)]
    mixed = F.silu(torch.stack(taps).sum(0))
    heads = mixed.reshape(len(h), count, -1, size).transpose(1, 2)
    q, k, v = heads[:, :groups], heads[:, groups : 2 * groups], heads[:, 2 * groups :]
    share = hybrid.n_value_heads // groups  # value head h reads key head h mod n_key_heads
    q = (_unit(q) / size**0.5).repeat(1, share, 1, 1)
    k = _unit(k).repeat(1, share, 1, 1)
    beta = torch.sigmoid(F.linear(h, w.beta).float()).transpose(1, 2)
    step = (F.linear(h, w.alpha).float() + w.dt).transpose(1, 2).contiguous()
    return rows, Rows(q, k, v, beta, w.a[:, None] * F.softplus(step))


def _outputs(told: Tensor, h: Tensor, w: DeltaNet, eps: float) -> Tensor:
    """What is added to the residual stream. told: [batch, value heads, rows, head_dim]."""
    normed = F.rms_norm(told.transpose(1, 2), w.norm.shape, w.norm, eps)
    gate = F.silu(F.linear(h, w.gate).float()).reshape(normed.shape)
    return F.linear((normed * gate).flatten(2).to(h.dtype), w.out)


def _unit(heads: Tensor) -> Tensor:
    return heads * torch.rsqrt(heads.pow(2).sum(-1, keepdim=True) + L2_EPS)
