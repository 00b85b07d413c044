"""DeltaNet layers in a pass: their buffers, and what is launched between two norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from orthrus_kernels.elementwise.rows import Rows
from orthrus_kernels.packing.quant_tensor import Layout
from orthrus_kernels.products.matmul import Activations
from orthrus_kernels.recurrence.states import Runs, States
from torch import Tensor

from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cuda.kernels import Kernels
from orthrus_gguf.runtime.cuda.weight_plan import WeightPlan
from orthrus_gguf.runtime.cuda.weights import Layer
from orthrus_gguf.runtime.protocol import View


@dataclass(frozen=True)
class DeltaBuffers:
    """What the rows of a pass become in a DeltaNet layer.

    mixed: f32 [rows, channels]. strengths: f32 [rows, 2 value heads]. told: f32 [rows, inner], what
    the states say. normed: the same, as the output's product reads it, by layout.
    """

    mixed: Tensor
    strengths: Tensor
    told: Tensor
    normed: dict[Layout, Activations]


def new_delta_buffers(
    config: ModelConfig,
    rows: int,
    device: torch.device,
    layouts: set[Layout],
    new_rows: Callable[[Layout, int, int, torch.device], Activations],
) -> DeltaBuffers | None:
    """Buffers for passes of up to so many rows; None for models without such layers."""
    h = config.hybrid
    if h is None or LayerKind.DELTA_NET not in config.layer_kinds:
        return None
    return DeltaBuffers(
        torch.empty(rows, h.channels, device=device),
        torch.empty(rows, 2 * h.n_value_heads, device=device),
        torch.zeros(rows, h.inner, device=device),  # unused rows are never written
        {layout: new_rows(layout, rows, h.inner, device) for layout in layouts},
    )


def input_sizes(plan: WeightPlan) -> list[int]:
    """Floats per row of the partials of each product with inputs, in the layer that has most."""
    sizes = [
        [by_view[View.AR].split * by_view[View.AR].columns for by_view in layer.delta_net.inputs]
        for layer in plan.layers
        if layer.delta_net is not None
    ]
    return [max(some) for some in zip_longest(*sizes, fillvalue=0)]


def output_layouts(plan: WeightPlan) -> set[Layout]:
    """Forms in which the products behind DeltaNets read their rows."""
    nets = [layer.delta_net for layer in plan.layers if layer.delta_net is not None]
    return {net.output[View.AR].layout for net in nets}


def remember(
    launch: Kernels,
    config: ModelConfig,
    layer: Layer,
    rows: Rows,
    runs: Sequence[Runs],
    states: States,
    b: DeltaBuffers,
    parts: Sequence[Tensor],
    normed: Activations,
) -> None:
    """From the products with the inputs' matrices to the rows that the output's product reads.

    runs: one launch after the other. parts: f32 partials of `DeltaNet.inputs`. normed: those rows.
    """
    net, hybrid, count = layer.delta_net, config.hybrid, parts[0].shape[1]
    assert net is not None
    assert hybrid is not None
    inputs, gates = parts[0], parts[-1][..., -2 * hybrid.n_value_heads :]
    mixed, strengths, told = b.mixed[:count], b.strengths[:count], b.told[:count]
    launch.convolve(
        inputs, gates, net.conv, net.a, net.dt, rows, runs[0], states, layer.place, mixed, strengths
    )
    for some in runs:
        launch.recur(mixed, strengths, some, states, layer.place, told)
    launch.gated_norm(told, inputs, hybrid.channels, net.norm, config.rms_eps, rows, normed)
