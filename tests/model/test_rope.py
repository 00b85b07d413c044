"""Frequencies of RoPE: the table that runtimes use, the reference runtime's, and ggml's."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from orthrus_gguf.ggml.binding import ROPE_HALVES
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.ggml.tensors import Scratch
from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.rope import frequencies
from orthrus_gguf.runtime.reference import rope_frequencies

HEAD_DIM = 128

#: As in Llama 3.1: pairs that turn fast are left alone, slow ones are eight times slower.
LLAMA3 = tuple(np.geomspace(0.1, 30, HEAD_DIM // 2).clip(1, 8).astype(np.float32).tolist())

ROPES = {
    "plain": Rope(1e4),
    "linear": Rope(1e4, factor=4.0),
    "llama3": Rope(5e5, freq_factors=LLAMA3),
    "linear and factors": Rope(1e4, factor=2.0, freq_factors=LLAMA3),
    "yarn": Rope(1e6, factor=4.0, original_context=32768, ext_factor=1.0),
    "yarn, everything set": Rope(1e6, 8.0, 4096, 0.75, 0.9, 16.0, 2.0),
    "yarn of a short context": Rope(1e4, factor=4.0, original_context=32, ext_factor=1.0),
    "yarn and factors": Rope(1e4, 4.0, 2048, 1.0, freq_factors=LLAMA3),
}

ropes = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


@ropes
@pytest.mark.parametrize("head_dim", [16, 64, HEAD_DIM])
def test_the_reference_runtime_finds_the_same(rope: Rope, head_dim: int) -> None:
    """It computes them by itself, so that each is a check on the other."""
    if rope.freq_factors is not None:
        rope = Rope(**{**vars(rope), "freq_factors": rope.freq_factors[: head_dim // 2]})
    found, factor = frequencies(rope, head_dim)
    expected, expected_factor = rope_frequencies(rope, head_dim)
    assert found.shape == (head_dim // 2,)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@ropes
@pytest.mark.parametrize("position", [0, 1, 37, 300])
def test_ggml_turns_as_the_table_says(rope: Rope, position: int) -> None:
    """A head of ones and zeros, turned by ggml, shows cosines and sines."""
    found, factor = frequencies(rope, HEAD_DIM)
    angles = position * found
    expected = np.concatenate([np.cos(angles), np.sin(angles)]) * factor
    # ggml multiplies its way from pair to pair in single precision.
    np.testing.assert_allclose(
        ggml_turned(rope, position), expected, rtol=0, atol=1e-6 + 2e-7 * position
    )


def ggml_turned(rope: Rope, position: int) -> NDArray[np.float32]:
    """(1, …, 1, 0, …, 0), whose halves are pairs, at this position."""
    api, half = load_library().api, HEAD_DIM // 2
    head = np.repeat(np.array([1, 0], np.float32), half)[None]
    with Scratch(api) as s:
        x = api.reshape_3d(s.context, s.tensor(head), HEAD_DIM, 1, 1)
        factors = rope.freq_factors and s.tensor(np.array(rope.freq_factors, np.float32))
        turned = api.rope_ext(
            s.context,
            x,
            s.tensor(np.array([position], np.int32)),
            factors or None,
            HEAD_DIM,
            ROPE_HALVES,
            rope.original_context,
            rope.freq_base,
            1 / rope.factor,
            rope.ext_factor,
            rope.attn_factor,
            rope.beta_fast,
            rope.beta_slow,
        )
        return s.compute(turned, (HEAD_DIM,))


def test_llama3_leaves_fast_pairs_alone() -> None:
    plain, _ = frequencies(ROPES["plain"], HEAD_DIM)
    slowed, factor = frequencies(Rope(1e4, freq_factors=LLAMA3), HEAD_DIM)
    assert factor == 1
    np.testing.assert_array_equal(slowed[:20], plain[:20])
    np.testing.assert_allclose(slowed[-10:], plain[-10:] / 8)
