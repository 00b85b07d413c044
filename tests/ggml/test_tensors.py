"""Tensors over Python's memory, and row-wise products."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.ggml.tensors import (
    ALIGNMENT,
    Scratch,
    Tensors,
    aligned_bytes,
    array_at,
    multiply_rows,
)

API = load_library().api
TYPES = gguf.GGMLQuantizationType


def test_our_alignment_is_ggmls() -> None:
    assert API.backend_buft_get_alignment(API.backend_cpu_buffer_type()) == ALIGNMENT


@pytest.mark.parametrize("n_bytes", [1, 31, 32, 1000])
def test_aligned_bytes(n_bytes: int) -> None:
    memory = aligned_bytes(n_bytes)
    assert memory.nbytes == n_bytes
    assert memory.ctypes.data % ALIGNMENT == 0


def test_what_ggml_would_abort_on_is_a_value_error() -> None:
    tensors = Tensors(API, 4)
    memory = aligned_bytes(4096)
    address = memory.ctypes.data
    assert tensors.place(int(TYPES.Q8_0), (2, 32), address)
    for shape, offset in (((2, 31), 0), ((2, 32), 8), ((0, 32), 0), ((2, 0), 0)):
        with pytest.raises(ValueError, match="cannot place"):
            tensors.place(int(TYPES.Q8_0), shape, address + offset)
    tensors.close()


def test_a_tensor_uses_the_memory_it_is_given() -> None:
    tensors = Tensors(API, 1)
    memory = aligned_bytes(6 * 4)
    tensor = tensors.place(int(TYPES.F32), (2, 3), memory.ctypes.data)
    assert API.get_data(tensor) == memory.ctypes.data
    array_at(API.get_data(tensor), np.float32, (2, 3))[1, 2] = 7
    assert memory.view(np.float32)[5] == 7
    tensors.close()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_multiply_rows(rows: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 64)).astype(np.float32)
    w = rng.standard_normal((10, 64)).astype(np.float32)
    with Scratch(API) as s:
        product = multiply_rows(API, s.context, s.tensor(w), s.tensor(x), 64, rows)
        found = s.compute(product, (rows, 10))
    np.testing.assert_allclose(found, x.astype(np.float64) @ w.T, rtol=1e-4, atol=1e-5)
