"""Frequency factors of RoPE: how Llama 3's longer contexts are made from shorter ones."""

from __future__ import annotations

import math

import numpy as np


def llama3_factors(
    freq_base: float,
    head_dim: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> tuple[float, ...]:
    """What divides the frequency of each pair: 1 for those that turn often within the original
    context, `factor` for those that turn rarely, and blends between. In single precision."""
    pairs = np.arange(0, head_dim, 2, dtype=np.float64)
    turns = original_context * freq_base ** (-pairs / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    factors = 1 / ((1 - smooth) / factor + smooth)
    return tuple(factors.astype(np.float32).tolist())
