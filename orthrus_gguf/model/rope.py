"""RoPE as a table of frequencies, for runtimes that turn the heads themselves.

The reference runtime computes them by itself, in torch: two ways that tests compare.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.model.config import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[NDArray[np.float64], float]:
    """Radians per position of each pair, [head_dim / 2], and the factor on cosine and sine.

    Which elements are a pair is the architecture's `Pairing`. As `ggml_rope_ext` defines it: the
    frequency of pair i is `freq_base ** (-2i / head_dim)`, divided by its frequency factor where
    there are any; linear scaling divides all of them by `factor`; YaRN (arXiv 2309.00071) does so
    with those that turn less than `beta_slow` times over the original context, leaves those that
    turn more than `beta_fast` times, and blends between.
    """
    pairs = np.arange(head_dim // 2, dtype=np.float64)
    plain = np.power(rope.freq_base, -2 * pairs / head_dim)
    if rope.freq_factors is not None:
        plain /= np.asarray(rope.freq_factors, np.float64)
    scaled = plain / rope.factor
    if rope.ext_factor == 0:
        return scaled, rope.attn_factor
    low = max(0, math.floor(_pair_that_turns(rope.beta_fast, rope, head_dim)))
    high = min(head_dim - 1, math.ceil(_pair_that_turns(rope.beta_slow, rope, head_dim)))
    kept = rope.ext_factor * (1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1))
    return scaled + kept * (plain - scaled), rope.attn_factor * (1 + 0.1 * math.log(rope.factor))


def _pair_that_turns(times: float, rope: Rope, head_dim: int) -> float:
    """The (fractional) pair that turns so many times over the original context, unscaled."""
    wavelength = rope.original_context / times
    return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.freq_base))
