"""Attention and the cache in plain torch and float64, with the signatures of the kernels: slow, the
oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from orthrus_kernels.attention.attention import AttentionScratch, Sight, Tiles
from orthrus_kernels.attention.finish_qkv import HeadWeights
from orthrus_kernels.attention.kv_cache import QBLOCK, Caches, KvPlanes, dequantize_planes
from orthrus_kernels.elementwise.activation_rows import Int8Rows
from orthrus_kernels.elementwise.plain import normed, store_rows
from orthrus_kernels.elementwise.rows import AR, DIFFUSION, Rows


def attention(
    q: Tensor,
    caches: Caches,
    layer: int,
    block_keys: KvPlanes,
    block_values: KvPlanes,
    rows: Rows,
    tiles: Tiles,
    scratch: AttentionScratch,
    out: Tensor | Int8Rows,
    gates: Tensor | None = None,
    sight: Sight | None = None,
) -> None:
    """See `orthrus_kernels.attention.attention.attention`; `scratch` is not used."""
    count, n_head, head_dim = q.shape
    group = n_head // caches.heads
    result = torch.zeros(count, n_head * head_dim, dtype=torch.float64, device=q.device)
    for first, _, first_tile, n_tiles in tiles.windows:
        for entry in tiles.table[first_tile : first_tile + n_tiles].tolist():
            run, run_rows, packed, sequence, edge, shift = entry
            if packed or not run_rows:
                continue  # all rows of a run at its first tile
            last = first + run + run_rows
            reach = torch.arange(int(rows.visible[first + run : last].max()))
            reach += torch.where(reach >= edge, shift, 0)
            keys, values = (_seen(planes.layer(layer), reach) for planes in caches.held[sequence])
            for row in range(first + run, last):
                sees, position = int(rows.visible[row]), int(rows.positions[row])
                start, stop = int(rows.block_first[row]), int(rows.block_stop[row])
                seen = slice(0 if sight is None else max(position + 1 - sight.back, 0), sees)
                if sight is not None and sight.causal:
                    stop = min(stop, start + position + 1 - sees)
                block = slice(start, max(start, stop))
                k = torch.cat([keys[:, seen], block_keys.values[:, block].double()], dim=1)
                v = torch.cat([values[:, seen], block_values.values[:, block].double()], dim=1)
                if k.shape[1] == 0:
                    continue
                heads = q[row].double().view(caches.heads, group, head_dim)
                scores = torch.einsum("hgd,hnd->hgn", heads, k) / head_dim**0.5
                mixed = torch.einsum("hgn,hnd->hgd", scores.softmax(-1), v)
                result[row] = mixed.reshape(-1)
    if gates is not None:
        heads = gates.double().sum(0)[:, : 2 * n_head * head_dim].view(count, n_head, 2, head_dim)
        result *= heads[:, :, 1].flatten(1).sigmoid()
    store_rows(result, out)


def _seen(planes: KvPlanes, columns: Tensor) -> Tensor:
    """Some columns of one layer, f64."""
    values = planes.values[:, columns]
    scales = planes.scales if planes.type_name == "f16" else planes.scales[:, columns]
    some = KvPlanes(planes.type_name, planes.head_dim, values, scales)
    return dequantize_planes(some).double()


def finish_qkv(
    partials: Tensor,
    weights: HeadWeights,
    rows: Rows,
    q: Tensor,
    caches: Caches,
    layer: int,
    block_keys: KvPlanes,
    block_values: KvPlanes,
) -> None:
    """See `orthrus_kernels.attention.finish_qkv.finish_qkv`."""
    count, n_head, d = q.shape
    views = rows.views.clamp_min(0).long()
    x = partials.double().sum(0)
    if weights.biases is not None:
        x = x + weights.biases[views]
    heads = x.view(count, -1, d)
    if weights.gated:
        queries = heads[:, : 2 * n_head : 2]
        heads = torch.cat([queries, heads[:, 2 * n_head :]], dim=1)
    turned = []
    for part, index in ((slice(0, n_head), 0), (slice(n_head, n_head + caches.heads), 1)):
        y = heads[:, part].contiguous()
        if weights.norms is not None:
            y = normed(y, weights.norms[views, index][:, None], weights.eps)
        turned.append(_rotated(y, rows, weights.adjacent))
    q.copy_(turned[0])
    k, v = turned[1].float(), heads[:, n_head + caches.heads :].float()
    more = rows.more.tolist()
    for row, view in enumerate(rows.views.tolist()):
        if view == AR:
            places = [int(rows.places[row])]
            places += more[int(rows.more_first[row]) : int(rows.more_stop[row])]
            pairs = zip(caches.held[int(rows.sequences[row])], (k[row], v[row]), strict=True)
            for planes, written in pairs:
                for place in places:
                    write_planes(planes.layer(layer), place, written)
        elif view == DIFFUSION:
            write_planes(block_keys, row, k[row])
            write_planes(block_values, row, v[row])


def move_columns(caches: Caches, moves: Tensor, layers: int) -> None:
    """See `orthrus_kernels.attention.kv_cache.move_columns`."""
    for sequence, source, target in moves.tolist():
        if sequence < 0:
            continue
        for planes in caches.held[sequence]:
            planes.values[:, :, target] = planes.values[:, :, source]
            if planes.type_name != "f16":
                planes.scales[:, :, target] = planes.scales[:, :, source]


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


def _rotated(x: Tensor, rows: Rows, adjacent: bool) -> Tensor:
    """Heads [rows, heads, d], each pair turned by its row's angle, as far as there are angles."""
    cos, sin = rows.cos.double()[:, None], rows.sin.double()[:, None]
    x, rest = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    if adjacent:
        low, high = x[..., 0::2], x[..., 1::2]
        pairs = torch.stack([low * cos - high * sin, high * cos + low * sin], dim=-1)
        return torch.cat([pairs.flatten(-2), rest], dim=-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)
