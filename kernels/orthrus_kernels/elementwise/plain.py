"""The small kernels in plain torch, with their signatures. Slow, the oracle.

Sums are made in double precision, then rounded; quantized outputs follow ggml's rules.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from orthrus_kernels.attention.kv_cache import QBLOCK, KvPlanes
from orthrus_kernels.elementwise.activation_rows import Int8Rows
from orthrus_kernels.elementwise.activations import interleave
from orthrus_kernels.elementwise.rows import AR, DIFFUSION, UNUSED, Rows


def residual_norm(
    partials: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor | Int8Rows
) -> None:
    """See `orthrus_kernels.elementwise.ops.residual_norm`."""
    x = residual.double()
    if partials is not None:
        x = x + partials.double().sum(0)
        residual.copy_(x)
    store_rows(_normed(x, weight, eps), out)


def silu_multiply(gate: Tensor, up: Tensor, out: Tensor | Int8Rows) -> None:
    """See `orthrus_kernels.elementwise.ops.silu_multiply`."""
    store_rows(torch.nn.functional.silu(gate.double().sum(0)) * up.double().sum(0), out)


def quantize_rows(x: Tensor, out: Int8Rows) -> None:
    """See `orthrus_kernels.elementwise.ops.quantize_rows`."""
    store_rows(x.double(), out)


def finish_qkv(
    partials: Tensor,
    norms: Tensor,
    eps: float,
    rows: Rows,
    q: Tensor,
    keys: KvPlanes,
    values: KvPlanes,
    block_keys: KvPlanes,
    block_values: KvPlanes,
) -> None:
    """See `orthrus_kernels.elementwise.ops.finish_qkv`."""
    count, n_head, d = q.shape
    heads = partials.double().sum(0).view(count, -1, d)
    for row in range(count):
        view, position = int(rows.views[row]), int(rows.positions[row])
        q_norm, k_norm = norms[max(view, 0)]
        cos, sin = rows.cos[row].double(), rows.sin[row].double()
        q[row] = _rotated(_normed(heads[row, :n_head], q_norm, eps), cos, sin).to(q.dtype)
        k = _rotated(_normed(heads[row, n_head : n_head + keys.heads], k_norm, eps), cos, sin)
        v = heads[row, n_head + keys.heads :]
        if view == AR:
            write_planes(keys, position, k.float())
            write_planes(values, position, v.float())
        elif view == DIFFUSION:
            write_planes(block_keys, row, k.float())
            write_planes(block_values, row, v.float())


def write_planes(planes: KvPlanes, position: int, x: Tensor) -> None:
    """Store f32 [heads, head_dim] at one position, quantized as ggml does."""
    if planes.type_name == "f16":
        planes.values[:, position] = x.half()
        return
    groups = x.view(planes.heads, -1, QBLOCK)
    if planes.type_name == "q8_0":
        d = groups.abs().amax(-1, keepdim=True) / 127
    else:
        d = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    scaled = groups * torch.where(d == 0, 0, 1 / torch.where(d == 0, 1, d))
    planes.scales[:, position] = d[..., 0].half()
    if planes.type_name == "q8_0":
        size = scaled.abs()
        rounded = size.floor() + (2 * (size - size.floor())).floor()
        quants = (rounded.copysign(scaled) + 128).to(torch.uint8)
        planes.values[:, position] = quants.view(planes.heads, -1)
    else:
        quants = (scaled + 8.5).to(torch.uint8).clamp_max(15).view(planes.heads, -1)
        half = planes.values.shape[2]
        padded = torch.nn.functional.pad(quants, (0, 2 * half - planes.head_dim), value=8)
        planes.values[:, position] = padded[:, :half] | (padded[:, half:] << 4)


def plan_rows(
    state: Tensor,
    history: Tensor,
    segments: Tensor,
    alternatives: Tensor,
    mask_token: int,
    capacity: int,
    inv_freq: Tensor,
    rope_scale: float,
    rows: Rows,
) -> None:
    """See `orthrus_kernels.elementwise.rows.plan_rows`."""
    anchor = int(state[0])
    rows.views.fill_(UNUSED)
    for column in (rows.tokens, rows.positions, rows.visible, rows.block_first, rows.block_stop):
        column.zero_()
    for view, first, count, offset, alternative in segments.tolist():
        start = anchor + offset
        for i in range(count):
            row, position = first + i, start + i
            if view == UNUSED or (view == AR and position >= capacity):
                continue
            rows.views[row], rows.positions[row] = view, position
            if view == AR:
                rows.tokens[row], rows.visible[row] = history[position], position + 1
                continue
            guess = history[position] if alternative < 0 else alternatives[alternative]
            rows.tokens[row] = guess if i == 0 else mask_token
            rows.visible[row] = min(start, capacity)
            rows.block_first[row], rows.block_stop[row] = first, first + count
    angles = rows.positions.double()[:, None] * inv_freq
    rows.cos.copy_(angles.cos() * rope_scale)
    rows.sin.copy_(angles.sin() * rope_scale)


def embed(table: Tensor, type_name: str, tokens: Tensor, codebook: Tensor, out: Tensor) -> None:
    """See `orthrus_kernels.elementwise.embedding.embed`; gguf's dequantizer, so `codebook` is not used."""
    rows = table[tokens.long()].cpu().numpy()
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_name])
    out.copy_(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def store_rows(y: Tensor, out: Tensor | Int8Rows) -> None:
    """Round rows [rows, n] to the form of `out`."""
    if isinstance(out, Tensor):
        out.copy_(interleave(y.clamp(-65504, 65504)))
        return
    groups = y.float().view(y.shape[0], -1, QBLOCK)
    d = groups.abs().amax(-1) / 127
    size = (groups.abs() / torch.where(d == 0, 1, d)[..., None] + 0.5).floor()
    out.quants.copy_(size.copysign(groups))
    out.scales.copy_(d)
    out.sums.copy_(d * out.quants.float().sum(-1))
