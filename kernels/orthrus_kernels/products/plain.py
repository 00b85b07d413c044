"""The matrix products in plain torch, with the signatures of matmul.py: slow, and the oracle.

Weights come from the GGUF bytes through the `gguf` package's dequantizer, sums run in float64.
"""

from __future__ import annotations

import math

import torch
from gguf.quants import dequantize as dequantize_rows
from torch import Tensor

from orthrus_kernels.elementwise.activation_rows import Int8Rows, new_f16_rows
from orthrus_kernels.elementwise.activations import deinterleave, interleave
from orthrus_kernels.packing.pack import PAIR_ROWS, unpack
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, STEP, Layout, QuantTensor
from orthrus_kernels.products.dispatch import Tile
from orthrus_kernels.products.matmul import Activations, Top2


def dequantize(weight: QuantTensor) -> Tensor:
    """f32 [rows, k], in natural order."""
    rows = torch.from_numpy(dequantize_rows(unpack(weight).cpu().numpy(), weight.type))
    return rows.reshape(weight.rows, weight.k).to(weight.device)


def natural_rows(x: Activations, k: int) -> Tensor:
    """f64 [rows, k] of either kind of activations."""
    if isinstance(x, Int8Rows):
        return (x.quants.double() * x.scales.double()[..., None]).reshape(x.quants.shape[0], k)
    return deinterleave(x, k).double()


def matmul(
    x: Activations,
    weight: QuantTensor,
    tile: Tile,
    split: int = 1,
    second: QuantTensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `orthrus_kernels.products.matmul.matmul`; `tile` changes nothing."""
    rows = natural_rows(x, weight.k)
    matrices = [dequantize(tensor).double() for tensor in (weight, second) if tensor is not None]
    both = torch.cat(matrices)
    share = -(-(weight.padded_k // STEP) // split) * STEP
    parts = [
        rows[:, start : start + share] @ both[:, start : start + share].T
        for start in range(0, split * share, share)
    ]
    result = torch.stack(parts).float()
    return result if out is None else out.copy_(result)


def gate_up(
    x: Activations, weight: QuantTensor, tile: Tile, out: Activations | None = None
) -> Activations:
    """See `orthrus_kernels.products.matmul.gate_up`."""
    product = natural_rows(x, weight.k) @ dequantize(weight).double().T
    pairs = product.reshape(product.shape[0], -1, 2, PAIR_ROWS)
    gate, up = (pairs[:, :, index].flatten(1) for index in range(2))
    value = torch.nn.functional.silu(gate) * up
    if out is None:
        out = new_f16_rows(value.shape[0], value.shape[1], weight.device)
    if isinstance(out, Int8Rows):
        groups = value.float().reshape(value.shape[0], -1, 32)
        scales = groups.abs().amax(-1) / 127
        safe = torch.where(scales == 0, 1.0, scales)[..., None]
        quants = ((groups.abs() / safe + 0.5).floor() * groups.sign()).to(torch.int8)
        out.quants.copy_(quants)
        out.scales.copy_(scales)
        out.sums.copy_(scales * quants.float().sum(-1))
    else:
        out.copy_(interleave(value.clamp(-65504, 65504)))
    return out


def head_top2(x: Activations, weight: QuantTensor, tile: Tile) -> Top2:
    """See `orthrus_kernels.products.matmul.head_top2`; all columns are one tile."""
    logits = matmul(x, weight, tile)[0].nan_to_num(math.inf, math.inf, -math.inf)
    best = logits.amax(1, keepdim=True)
    # torch promises no order among equal values: take the first that equals the largest.
    first = (logits == best).int().argmax(1, keepdim=True)
    rest = logits.scatter(1, first, -math.inf)
    second = rest.amax(1, keepdim=True)
    runner_up = (rest == second).int().argmax(1, keepdim=True)
    values = torch.cat([best, second, (logits - best).exp().sum(1, keepdim=True)], 1)
    return Top2(values.T[:, None], torch.cat([first, runner_up], 1).T[:, None].int())


def prompt_matmul(x: Tensor, weight: QuantTensor, scratch: Tensor, out: Tensor) -> None:
    """See `orthrus_kernels.products.dequantize.prompt_matmul`; `scratch` is not used."""
    in_order = weight.layout is Layout.A8 and weight.type not in PLAIN_TYPES
    rows = x[:, : weight.k].double() if in_order else natural_rows(x, weight.k)
    out.copy_(rows @ dequantize(weight).double().T)
