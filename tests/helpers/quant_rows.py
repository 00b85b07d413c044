"""Random but valid GGUF rows, with ordinary or extreme scales, for the kernel tests."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

SCALE_BYTES = {
    T.Q4_K: (0, 2),
    T.Q5_K: (0, 2),
    T.Q6_K: (208,),
    T.Q8_0: (0,),
    T.Q4_0: (0,),
    T.Q5_0: (0,),
    T.Q3_K: (108,),
    T.Q2_K: (80, 82),
    T.IQ4_NL: (0,),
    T.IQ4_XS: (0,),
    T.Q4_1: (0, 2),
    T.Q5_1: (0, 2),
}
"""Where the fp16 numbers of a qblock start; every other byte may have any value."""


def random_rows(
    kind: T, rows: int, k: int, seed: int = 0, scales: tuple[float, ...] = ()
) -> Tensor:
    """u8 [rows, row bytes]: random codes; fp16 scales from +-1e-3, or drawn from `scales`."""
    random = np.random.default_rng(seed)
    if kind in (T.F16, T.BF16):
        numbers = torch.from_numpy(random.standard_normal((rows, k), dtype=np.float32))
        dtype = torch.float16 if kind == T.F16 else torch.bfloat16
        return numbers.to(dtype).view(torch.uint8).reshape(rows, -1)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (rows, k // size, width), dtype=np.uint8)
    for start in SCALE_BYTES[kind]:
        if scales:
            drawn = random.choice(np.array(scales), (rows, k // size, 1))
        else:
            drawn = random.uniform(-1e-3, 1e-3, (rows, k // size, 1))
        raw[..., start : start + 2] = drawn.astype(np.float16).view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


def dequantized(kind: T, raw: Tensor) -> Tensor:
    """f64 [rows, k] by the `gguf` package."""
    values = gguf.quants.dequantize(raw.numpy(), kind)
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).reshape(raw.shape[0], -1)


def nmse(found: Tensor, expected: Tensor) -> float:
    """Squared error over squared size."""
    wanted = expected.double()
    return float(((found.double() - wanted) ** 2).sum() / (wanted**2).sum())
