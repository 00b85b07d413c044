"""Static buffers: what every pass writes, allocated once so that graphs keep their addresses.

Passes of up to `rows` rows use the first rows of each buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from orthrus_kernels.attention.attention import AttentionScratch, new_attention_scratch
from orthrus_kernels.attention.kv_cache import KvPlanes, new_planes
from orthrus_kernels.elementwise.activation_rows import Int8Rows, new_f16_rows, new_int8_rows
from orthrus_kernels.elementwise.embedding import iq4_codebook
from orthrus_kernels.elementwise.rows import new_angles
from orthrus_kernels.packing.quant_tensor import Layout
from orthrus_kernels.products.dispatch import MAX_ROWS
from orthrus_kernels.products.matmul import Activations
from orthrus_kernels.sampling.sample import SampleScratch, new_sample_scratch
from torch import Tensor

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cuda.delta_net import (
    DeltaBuffers,
    input_sizes,
    new_delta_buffers,
    output_layouts,
)
from orthrus_gguf.runtime.cuda.weight_plan import WeightPlan
from orthrus_gguf.runtime.protocol import View


@dataclass(frozen=True)
class Buffers:
    """Outputs of the kernels, in the order of a layer; then the head's and the sampler's.

    normed, mixed, gated, hidden: rows of activations by layout, for the products that read them.
    qkv, attention_sums, down: f32 partials [split, rows, columns]; gate, up likewise, where those
    are separate products. Of DeltaNets: delta_inputs, floats for the partials of each product with
    their inputs; delta_sums like attention_sums; delta.
    """

    cos: Tensor
    sin: Tensor
    x: Tensor
    normed: dict[Layout, Activations]
    qkv: Tensor
    q: Tensor
    block_keys: KvPlanes
    block_values: KvPlanes
    scratch: AttentionScratch
    mixed: dict[Layout, Activations]
    attention_sums: Tensor
    gate: Tensor | None
    up: Tensor | None
    gated: dict[Layout, Activations]
    down: Tensor
    hidden: Activations
    logits: Tensor
    sampling: SampleScratch
    codebook: Tensor
    delta_inputs: tuple[Tensor, ...] = ()
    delta_sums: Tensor | None = None
    delta: DeltaBuffers | None = None


def pass_rows(config: ModelConfig) -> int:
    """Most rows of a pass that is no prompt: what kernels are made for, at least a block."""
    return max(MAX_ROWS, config.block_size or 0)


def new_buffers(config: ModelConfig, plan: WeightPlan, device: torch.device) -> Buffers:
    """Buffers for the passes of a model."""
    c, rows = config, pass_rows(config)
    first = next(layer for layer in plan.layers if layer.qkv)
    net = next((layer.delta_net for layer in plan.layers if layer.delta_net), None)
    heads = c.n_head * c.head_dim
    gated = heads if c.architecture.hybrid else 0

    def activations(columns: int, layouts: set[Layout]) -> dict[Layout, Activations]:
        return {layout: new_rows(layout, rows, columns, device) for layout in layouts}

    def partials(split: int, columns: int) -> Tensor:
        return torch.empty(split, rows, columns, device=device)

    separate = [layer.gate_up for layer in plan.layers if len(layer.gate_up.matrices) > 1]
    gate, up = (partials(separate[0].split, c.n_ff) if separate else None for _ in range(2))
    cos, sin = new_angles(rows, c.rotary_dim, device)
    block_keys, block_values = (
        new_planes("f16", c.n_head_kv, rows, c.head_dim, device) for _ in range(2)
    )
    return Buffers(
        cos=cos,
        sin=sin,
        x=torch.empty(rows, c.n_embd, device=device),
        normed=activations(c.n_embd, normed_layouts(plan)),
        qkv=partials(first.qkv[View.AR].split, gated + heads + 2 * c.n_head_kv * c.head_dim),
        q=torch.empty(rows, c.n_head, c.head_dim, dtype=torch.float16, device=device),
        block_keys=block_keys,
        block_values=block_values,
        scratch=new_attention_scratch(rows, c.n_head, c.n_head_kv, c.head_dim, device),
        mixed=activations(
            heads, {layer.output[View.AR].layout for layer in plan.layers if layer.output}
        ),
        attention_sums=partials(first.output[View.AR].split, c.n_embd),
        gate=gate,
        up=up,
        gated=activations(c.n_ff, {layer.down.layout for layer in plan.layers}),
        down=partials(first.down.split, c.n_embd),
        hidden=new_rows(plan.head.layout, rows, c.n_embd, device),
        logits=torch.empty(rows, c.n_vocab, device=device),
        sampling=new_sample_scratch(rows, c.n_vocab, device),
        codebook=iq4_codebook(device),
        delta_inputs=tuple(torch.empty(rows * size, device=device) for size in input_sizes(plan)),
        delta_sums=partials(net.output[View.AR].split, c.n_embd) if net else None,
        delta=new_delta_buffers(c, rows, device, output_layouts(plan), new_rows),
    )


def normed_layouts(plan: WeightPlan) -> set[Layout]:
    """Forms in which products read normed rows, the head's aside."""
    found = {layer.gate_up.layout for layer in plan.layers}
    for layer in plan.layers:
        readers = layer.delta_net.inputs if layer.delta_net else (layer.qkv,)
        found |= {by_view[View.AR].layout for by_view in readers}
    return found


def new_rows(layout: Layout, rows: int, columns: int, device: torch.device) -> Activations:
    """Rows of activations in the form that a layout reads."""
    if layout is Layout.A8:
        return new_int8_rows(rows, columns, device)
    return new_f16_rows(rows, columns, device)


def row_range(x: Activations, start: int, stop: int) -> Activations:
    """Rows of either kind of activations."""
    if isinstance(x, Int8Rows):
        return Int8Rows(x.quants[start:stop], x.scales[start:stop], x.sums[start:stop])
    return x[start:stop]
