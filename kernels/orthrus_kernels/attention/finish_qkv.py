"""From the products with q, k and v to attention: sums, biases, norms, RoPE, cache writes."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from orthrus_kernels.attention.kv_cache import FORMATS, Caches, KvPlanes, planes_of, store_head
from orthrus_kernels.elementwise.ops import part_sizes, split_sum
from orthrus_kernels.elementwise.rows import Rows
from orthrus_kernels.overlap import begin, overlapped


@dataclass(frozen=True)
class HeadWeights:
    """What happens to q and k (and v) between their product and attention.

    norms: f32 [2 views, 2 (q, k), head_dim], or None for architectures without.
    biases: f32 [2 views, (n_head + 2 n_head_kv) * head_dim], or None.
    adjacent: RoPE turns elements 2i and 2i + 1, instead of i and i + half of those that it turns.
    gated: in the product, the gate of each query head's output comes behind that head.
    """

    norms: Tensor | None
    biases: Tensor | None
    adjacent: bool
    eps: float
    gated: bool = False


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
    """Sum the q, k and v products, add biases, norm and rotate q and k; write all three where they
    belong.

    partials: f32 [splits, rows, (n_head + 2 n_head_kv) * head_dim], q heads, then k, then v; n_head
    more where queries are gated. RoPE turns as many elements of a head as `rows` has angles for.
    q: f16 [rows, n_head, head_dim]; with 0 heads, the product is of k and v alone. AR keys and
    values go to the row's place in its cache (and to further ones, see `Rows`), those of diffusion
    rows to the pass's scratch (f16 planes by row); unused rows write only q.
    """
    count, n_head, head_dim = q.shape
    biases, norms = weights.biases, weights.norms
    given = partials if biases is None else biases
    _finish_qkv[(count, n_head + 2 * caches.heads)](
        partials,
        given if norms is None else norms,
        given,
        rows.views,
        rows.sequences,
        rows.places,
        rows.more_first,
        rows.more_stop,
        rows.more,
        rows.cos,
        rows.sin,
        q,
        caches.entries,
        *caches.pointers(),
        block_keys.values,
        block_values.values,
        *part_sizes(partials),
        layer,
        block_keys.capacity,
        weights.eps,
        SPLITS=partials.shape[0],
        N_HEAD=n_head,
        HEADS=caches.heads,
        D=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        K_FORMAT=FORMATS[caches.type_k],
        V_FORMAT=FORMATS[caches.type_v],
        NORMS=norms is not None,
        BIASES=biases is not None,
        ADJACENT=weights.adjacent,
        TURNED=2 * rows.cos.shape[1],
        GATED=weights.gated,
        num_warps=1,
        enable_fp_fusion=False,
        **overlapped(),
    )


@triton.jit(do_not_specialize=["part_rows", "layer", "block_capacity"])
def _finish_qkv(
    partials,
    norms,
    biases,
    views,
    sequences,
    places,
    more_first,
    more_stop,
    more,
    cos,
    sin,
    q,
    entries,
    k_values,
    k_scales,
    v_values,
    v_scales,
    block_k,
    block_v,
    part_rows,
    part_stride,
    layer,
    block_capacity,
    eps,
    SPLITS: tl.constexpr,
    N_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    NORMS: tl.constexpr,
    BIASES: tl.constexpr,
    ADJACENT: tl.constexpr,
    TURNED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Program (row, head), heads counted over q, k and v."""
    begin()
    row = tl.program_id(0)
    head = tl.program_id(1)
    view = tl.load(views + row)
    c = tl.arange(0, WIDTH)
    inside = c < D
    first = head * D
    if GATED:
        first += tl.minimum(head, N_HEAD) * D
    x = split_sum(partials, row, part_rows, part_stride, first + c, inside, SPLITS)
    at_bias = biases + tl.maximum(view, 0) * ((N_HEAD + 2 * HEADS) * D) + head * D
    if BIASES:
        x += tl.load(at_bias + c, mask=inside, other=0.0)
    kv_head = ((head + HEADS - N_HEAD % HEADS) % HEADS).to(tl.int64)
    at_block = kv_head * block_capacity + row
    if head < N_HEAD + HEADS:
        # Norm and rotation: element c turns with its partner.
        HALF: tl.constexpr = TURNED // 2
        turns = c < TURNED
        if ADJACENT:
            is_first = c % 2 == 0
            partner = c ^ 1
            pair = row * HALF + c // 2
        else:
            is_first = c < HALF
            partner = tl.where(is_first, c + HALF, c - HALF)
            pair = row * HALF + tl.where(is_first, c, c - HALF)
        y = split_sum(partials, row, part_rows, part_stride, first + partner, turns, SPLITS)
        if BIASES:
            y += tl.load(at_bias + partner, mask=turns, other=0.0)
        if NORMS:
            inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / D + eps))
            at_norm = norms + (tl.maximum(view, 0) * 2 + (head >= N_HEAD).to(tl.int32)) * D
            x = x * inverse * tl.load(at_norm + c, mask=inside, other=0.0)
            y = y * inverse * tl.load(at_norm + partner, mask=turns, other=0.0)
        turned = y * tl.load(sin + pair, mask=turns, other=0.0)
        x = x * tl.load(cos + pair, mask=turns, other=1.0)
        x = x + tl.where(is_first, -turned, turned)
        if head < N_HEAD:
            at_q = q + (row * N_HEAD + head).to(tl.int64) * D + c
            tl.store(at_q, x.to(tl.float16), mask=inside)
        elif view == 0:
            sequence = tl.load(sequences + row)
            values, scales, capacity = planes_of(entries, sequence, k_values, k_scales, 0, K_FORMAT)
            base = (layer.to(tl.int64) * HEADS + kv_head) * capacity
            store_head(x, values, scales, base + tl.load(places + row), D, WIDTH, K_FORMAT)
            for i in range(tl.load(more_first + row), tl.load(more_stop + row)):
                store_head(x, values, scales, base + tl.load(more + i), D, WIDTH, K_FORMAT)
        elif view == 1:
            store_head(x, block_k, block_k, at_block, D, WIDTH, 0)
    elif view == 0:
        sequence = tl.load(sequences + row)
        values, scales, capacity = planes_of(entries, sequence, v_values, v_scales, 2, V_FORMAT)
        base = (layer.to(tl.int64) * HEADS + kv_head) * capacity
        store_head(x, values, scales, base + tl.load(places + row), D, WIDTH, V_FORMAT)
        for i in range(tl.load(more_first + row), tl.load(more_stop + row)):
            store_head(x, values, scales, base + tl.load(more + i), D, WIDTH, V_FORMAT)
    elif view == 1:
        store_head(x, block_v, block_v, at_block, D, WIDTH, 0)
