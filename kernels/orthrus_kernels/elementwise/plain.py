"""The small kernels in plain torch, with their signatures. Slow, the oracle.

Sums are made in double precision, then rounded; quantized outputs follow ggml's rules.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from orthrus_kernels.elementwise.activation_rows import GROUP, Int8Rows
from orthrus_kernels.elementwise.activations import interleave
from orthrus_kernels.elementwise.rows import Rows


def residual_norm(
    partials: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | Int8Rows,
    index: Tensor | None = None,
) -> None:
    """See `orthrus_kernels.elementwise.ops.residual_norm`."""
    taken = slice(None) if index is None else index.long()
    x = residual[taken].double()
    if partials is not None:
        x = x + partials[:, taken].double().sum(0)
        if index is None:
            residual.copy_(x)
    store_rows(normed(x, weight, eps), out)


def silu_multiply(gate: Tensor, up: Tensor, out: Tensor | Int8Rows, *, paired: int = 0) -> None:
    """See `orthrus_kernels.elementwise.ops.silu_multiply`."""
    if paired:
        both = gate.view(*gate.shape[:2], -1, 2, paired)
        gate, up = (both[..., part, :].flatten(2) for part in range(2))
    store_rows(torch.nn.functional.silu(gate.double().sum(0)) * up.double().sum(0), out)


def quantize_rows(x: Tensor, out: Tensor | Int8Rows) -> None:
    """See `orthrus_kernels.elementwise.ops.quantize_rows`."""
    store_rows(x.double(), out)


def rotary_angles(rows: Rows, inv_freq: Tensor, scale: float) -> None:
    """See `orthrus_kernels.elementwise.rows.rotary_angles`."""
    angles = rows.positions.double()[:, None] * inv_freq
    rows.cos.copy_(angles.cos() * scale)
    rows.sin.copy_(angles.sin() * scale)


def embed(table: Tensor, type_name: str, tokens: Tensor, codebook: Tensor, out: Tensor) -> None:
    """See `embedding.embed`; gguf's dequantizer, so `codebook` is not used."""
    rows = table[tokens.long()].cpu().numpy()
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_name])
    out.copy_(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of f64 rows."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def store_rows(y: Tensor, out: Tensor | Int8Rows) -> None:
    """Round rows [rows, n] to the form of `out`."""
    if isinstance(out, Tensor):
        out.copy_(interleave(y.clamp(-65504, 65504)))
        return
    groups = y.float().view(y.shape[0], -1, GROUP)
    d = groups.abs().amax(-1) / 127
    size = (groups.abs() / torch.where(d == 0, 1, d)[..., None] + 0.5).floor()
    out.quants.copy_(size.copysign(groups))
    out.scales.copy_(d)
    out.sums.copy_(d * out.quants.float().sum(-1))
