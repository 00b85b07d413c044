"""Quantization against libgguf, an independent build of the reference code, and gguf-py."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.ggml.quantize import needs_importance, quantize

TYPES = gguf.GGMLQuantizationType
API = load_library().api
VALUES = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
IMPORTANCE = np.random.default_rng(1).uniform(0.1, 5, 512).astype(np.float32)

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(scope="module")
def libgguf() -> Any:
    return pytest.importorskip("libgguf")


@pytest.mark.parametrize("name", [*NAMES, "IQ4_NL", "IQ4_XS", "TQ2_0"])
@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["plain", "imatrix"])
def test_bytes_equal_libgguf(libgguf: Any, name: str, importance: Any) -> None:
    qtype = gguf.GGMLQuantizationType[name]
    expected = libgguf.quantize_rows(VALUES, int(qtype), importance)
    np.testing.assert_array_equal(quantize(API, VALUES, qtype, importance), expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_bytes_equal_gguf_py(name: str) -> None:
    qtype = gguf.GGMLQuantizationType[name]
    expected = quants.quantize(VALUES, qtype).view(np.uint8)
    np.testing.assert_array_equal(quantize(API, VALUES, qtype), expected)


def test_importance_is_used() -> None:
    assert not np.array_equal(
        quantize(API, VALUES, TYPES.Q4_K), quantize(API, VALUES, TYPES.Q4_K, IMPORTANCE)
    )


def test_strided_rows() -> None:
    wide = np.random.default_rng(2).standard_normal((3, 1024)).astype(np.float32)
    np.testing.assert_array_equal(
        quantize(API, wide[:, ::2], TYPES.Q8_0), quantize(API, wide[:, ::2].copy(), TYPES.Q8_0)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(bad: float) -> None:
    values = VALUES.copy()
    values[1, 5] = bad
    with pytest.raises(OrthrusError, match="cannot quantize to Q4_K: some values are infinite"):
        quantize(API, values, TYPES.Q4_K)


def test_rows_must_fit() -> None:
    with pytest.raises(OrthrusError, match=r"3 rows of 500 values to Q4_K: .* qblocks of 256"):
        quantize(API, VALUES[:, :500], TYPES.Q4_K)
    with pytest.raises(OrthrusError, match="0 rows"):
        quantize(API, VALUES[:0], TYPES.Q8_0)


def test_types_that_need_importance() -> None:
    assert needs_importance(API, TYPES.IQ2_XXS)
    assert not needs_importance(API, TYPES.Q4_K)
    with pytest.raises(OrthrusError, match="IQ2_XXS needs an importance matrix"):
        quantize(API, VALUES, TYPES.IQ2_XXS)
    with pytest.raises(OrthrusError, match=r"expected 512 values, found shape \(256,\)"):
        quantize(API, VALUES, TYPES.Q4_K, IMPORTANCE[:256])
