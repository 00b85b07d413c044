"""Products, and what goes into them: the same bits from every object and in any company, and right.

Portable C is the oracle of the other objects; gguf's dequantizer and float64 are its own.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
from cpu_calls import assert_same, run_here
from cpu_cases import ROWS, WEIGHTS, Product, activations, products, weights, widths
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import FORM_BLOCK, FORM_FLOAT, FORM_K, Kernels

TYPES = gguf.GGMLQuantizationType
Floats = NDArray[np.float32]


def y_of(kernels: Kernels, product: Product) -> Floats:
    """The product [rows, columns]."""
    outputs = run_here(kernels, product.case(kernels))
    y: Floats = outputs[2].reshape(len(product.x), -1)
    return y[:, : len(product.raw)]


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_every_object_gives_the_bits_of_portable_c(
    objects: dict[str, Kernels], kind: TYPES
) -> None:
    """Panels, quantized rows, products and unpacked rows; any weights, any activations."""
    oracle = objects["portable"]
    for number, product in enumerate(products(kind)):
        case = product.case(oracle, add=number % 2 == 0)
        expected = run_here(oracle, case)
        for name, kernels in objects.items():
            assert_same(run_here(kernels, case), expected, f"{name}, {case.name}")


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_rows_do_not_depend_on_their_company(objects: dict[str, Kernels], kind: TYPES) -> None:
    k = widths(kind)[-1]
    raw = weights(kind, 37, k, 5)
    x = np.concatenate([activations(name, 16, k, seed) for seed, name in enumerate(ROWS)])
    for name, kernels in objects.items():
        alone = np.concatenate([y_of(kernels, Product(kind, raw, row[None])) for row in x])
        for rows in (*range(1, 65), 128) if name != "portable" else (3, 64, 128):
            together = y_of(kernels, Product(kind, raw, x[-rows:]))
            assert_same([together], [alone[-rows:]], f"{name}, {rows} rows")


def test_sums_that_are_added_to(objects: dict[str, Kernels]) -> None:
    """Twice the product, exactly: adding it to itself rounds nothing."""
    product = Product(TYPES.Q4_K, weights(TYPES.Q4_K, 20, 512), activations("ordinary", 3, 512))
    for kernels in objects.values():
        once = run_here(kernels, product.case(kernels))[2]
        twice = run_here(kernels, product.case(kernels, add=True))[2]
        np.testing.assert_array_equal(twice, 2 * once)
        assert np.abs(once).max() > 0


# --- right ---


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_unpacked_rows_are_ggufs(portable: Kernels, kind: TYPES) -> None:
    """To the last bit but one: the order of three factors is each implementation's own."""
    for extreme in (False, True):
        k = widths(kind)[-1]
        raw = weights(kind, 23, k, 3, extreme=extreme)
        product = Product(kind, raw, activations("zeros", 1, k))
        found = run_here(portable, product.case(portable))[3].reshape(23, k)
        data = raw.view({TYPES.F32: np.float32, TYPES.F16: np.float16}.get(kind, np.uint8))
        expected = gguf.quants.dequantize(data, kind)
        scale = np.abs(expected).max(axis=1, keepdims=True)
        assert (np.abs(found - expected) <= 3e-7 * scale).all()


def rounded(x: Floats, form: int) -> NDArray[np.float64]:
    """Activations as a form holds them: exactly, or the nearest of 255 multiples of a scale."""
    if form == FORM_FLOAT:
        return x.astype(np.float64)
    width = 256 if form == FORM_K else 32
    blocks = x.astype(np.float64).reshape(len(x), -1, width)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    found: NDArray[np.float64] = (codes * scale).reshape(x.shape)
    return found


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)
def test_products_are_those_of_the_rounded_activations(portable: Kernels, kind: TYPES) -> None:
    """Against float64. What remains: a rounding per qblock, 2^-24 of what is summed, and codes that
    lie next to a tie (a step of the scale, times one weight, where they go the other way)."""
    form = portable.form(int(kind))
    assert form is not None
    for k in widths(kind):
        raw = weights(kind, 23, k, 7)
        data = raw.view({TYPES.F32: np.float32, TYPES.F16: np.float16}.get(kind, np.uint8))
        w = gguf.quants.dequantize(data, kind).astype(np.float64)
        for name in ("ordinary", "zeros", "outlier", "saturated"):
            x = activations(name, 9, k, 1)
            found = y_of(portable, Product(kind, raw, x))
            summed = np.abs(rounded(x, form)) @ np.abs(w).T
            step = np.abs(x).max(axis=1, keepdims=True) / 127 * np.abs(w).max(axis=1)[None]
            bound = 2.0**-24 * (k / 8 + 64) * summed + (form != FORM_FLOAT) * step * 1.0001
            error = np.abs(found - rounded(x, form) @ w.T)
            assert (error <= bound).all(), f"{name}: {(error / np.maximum(bound, 1e-300)).max()}"
            # And of the activations themselves: half a step of the scale for each.
            allowed = bound if form == FORM_FLOAT else bound + step * k / 2
            assert (np.abs(found - x.astype(np.float64) @ w.T) <= allowed).all(), name


@pytest.mark.parametrize("form", [FORM_BLOCK, FORM_K])
def test_rows_that_are_not_finite_are_not_after_a_product(portable: Kernels, form: int) -> None:
    """int8 would hide it: the scale is NaN instead. Blocks beside it are as they were."""
    kind = TYPES.Q8_0 if form == FORM_BLOCK else TYPES.Q4_K
    raw = weights(kind, 16, 512)
    for bad in (np.nan, np.inf, -np.inf):
        x = activations("ordinary", 3, 512)
        expected = y_of(portable, Product(kind, raw, x))
        x[1, 300] = bad
        found = y_of(portable, Product(kind, raw, x))
        assert not np.isfinite(found[1]).any()
        np.testing.assert_array_equal(found[::2], expected[::2])


def test_activations_too_small_for_a_scale_are_zeros(objects: dict[str, Kernels]) -> None:
    for kernels in objects.values():
        for name in ("denormal", "zeros"):
            x = activations(name, 4, 256)
            found = y_of(kernels, Product(TYPES.Q6_K, weights(TYPES.Q6_K, 16, 256), x))
            assert not found.any()


# --- that these tests can fail ---


@pytest.fixture
def careless(portable: Kernels) -> Kernels:
    """Kernels whose products of many rows are off by one bit."""
    product = portable.library.orthrus_product

    class Library:
        def __getattr__(self, name: str) -> Any:
            return getattr(portable.library, name)

        def orthrus_product(self, *arguments: int) -> None:
            product(*arguments)
            rows, y = arguments[6], arguments[7]
            if rows > 1:
                first = ctypes.c_float.from_address(y)
                first.value = float(np.nextafter(np.float32(first.value), np.float32(9)))

    library: Any = Library()
    return replace(portable, library=library)


def test_one_bit_would_be_noticed(portable: Kernels, careless: Kernels) -> None:
    product = Product(TYPES.Q4_0, weights(TYPES.Q4_0, 16, 64), activations("ordinary", 2, 64))
    case = product.case(portable)
    with pytest.raises(AssertionError, match="output 2"):
        assert_same(run_here(careless, case), run_here(portable, case), "careless")
