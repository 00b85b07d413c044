"""The interleaved order of fp16 activations, and where a kernel stores its column in it.

Inside each 256 columns, k = 64r + 2i + e stands at 8i + 2r + e: the order of the weights' elements
(quant_tensor.py), so that the products copy their activations 16 bytes at a time. Rows are padded
with zeros to whole 256s. Writers store column k at `interleaved(k)`; it is a permutation of
pairs, so that stores stay 4 bytes wide. int8 activations keep their natural order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter wants it beside every kernel
from torch import Tensor

STEP = 256


def padded_columns(k: int) -> int:
    """Columns of an interleaved buffer for k columns."""
    return -(-k // STEP) * STEP


def interleave(x: Tensor) -> Tensor:
    """[rows, k] in natural order -> [rows, padded k] interleaved, padded with zeros."""
    rows, k = x.shape
    padded = torch.nn.functional.pad(x, (0, -k % STEP))
    runs = padded.reshape(rows, -1, 4, 32, 2)
    return runs.transpose(2, 3).reshape(rows, padded.shape[1])


def deinterleave(x: Tensor, k: int) -> Tensor:
    """Inverse of `interleave`: [rows, padded k] -> [rows, k]."""
    runs = x.reshape(x.shape[0], -1, 32, 4, 2)
    return runs.transpose(2, 3).reshape(x.shape[0], -1)[:, :k]


@triton.jit
def interleaved(k):
    """Where column k of a row is stored."""
    return (k & -256) + (k % 64 // 2) * 8 + (k % 256 // 64) * 2 + k % 2
