"""Attention in plain torch and float64, with the signature of the kernels. Slow, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from orthrus_kernels.attention.attention import AttentionScratch
from orthrus_kernels.attention.kv_cache import KvPlanes, dequantize_planes
from orthrus_kernels.elementwise.activation_rows import Int8Rows
from orthrus_kernels.elementwise.plain import store_rows


def attention(
    q: Tensor,
    keys: KvPlanes,
    values: KvPlanes,
    block_keys: KvPlanes,
    block_values: KvPlanes,
    visible: Tensor,
    block_first: Tensor,
    block_stop: Tensor,
    scratch: AttentionScratch,
    out: Tensor | Int8Rows,
) -> None:
    """See `orthrus_kernels.attention.attention.attention`; `scratch` is not used."""
    rows, n_head, head_dim = q.shape
    group = n_head // keys.heads
    result = torch.zeros(rows, n_head * head_dim, dtype=torch.float64, device=q.device)
    all_keys, all_values = dequantize_planes(keys).double(), dequantize_planes(values).double()
    for row in range(rows):
        seen = slice(0, int(visible[row]))
        block = slice(int(block_first[row]), max(int(block_first[row]), int(block_stop[row])))
        k = torch.cat([all_keys[:, seen], block_keys.values[:, block].double()], dim=1)
        v = torch.cat([all_values[:, seen], block_values.values[:, block].double()], dim=1)
        if k.shape[1] == 0:
            continue
        heads = q[row].double().view(keys.heads, group, head_dim)
        scores = torch.einsum("hgd,hnd->hgn", heads, k) / head_dim**0.5
        mixed = torch.einsum("hgn,hnd->hgd", scores.softmax(-1), v)
        result[row] = mixed.reshape(-1)
    store_rows(result, out)
