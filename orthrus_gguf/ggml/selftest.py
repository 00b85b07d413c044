"""Is this ggml the one we know? Every operation that the runtime uses, against numpy, in a few ms.

A library can be of a known version and still be wrong for us: built with a compiler that broke a
kernel, with signatures patched by a fork, or with kernels whose result for a row depends on how
many rows are computed together. The last would break the project's promise, so it is tested too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

from orthrus_gguf.ggml.binding import ROPE_ADJACENT, ROPE_HALVES, Ggml
from orthrus_gguf.ggml.quantize import quantize
from orthrus_gguf.ggml.tensors import Scratch, multiply_rows

_TYPES = gguf.GGMLQuantizationType
Array = NDArray[np.float32]

#: llama.cpp's own limit for matrix products in its backend tests (normalized mean squared error).
MAX_NMSE = 5e-4


def failure(api: Ggml) -> str | None:
    """What is wrong with this library, in a few words; None when nothing is."""
    rng = np.random.default_rng(20)
    checks: tuple[tuple[str, Callable[[Ggml, np.random.Generator], bool]], ...] = (
        ("quantization", _quantizes),
        ("matrix products", _multiplies),
        ("norms and activations", _normalizes),
        ("rotary embedding", _rotates),
        ("row copies", _copies_rows),
        ("attention", _attends),
        ("flash attention", _flash_attends),
    )
    for name, passes in checks:
        if not passes(api, rng):
            return f"{name} differ from the expected values"
    for qtype in (_TYPES.F32, _TYPES.F16, _TYPES.Q8_0, _TYPES.Q4_K, _TYPES.Q6_K):
        weights = _quantized(api, rng, qtype, 24, 512)
        if depends_on_company(api, weights, qtype, 512):
            return f"a row's products with {qtype.name} depend on the rows beside it"
    return None


def depends_on_company(
    api: Ggml, weights: NDArray[np.uint8], qtype: gguf.GGMLQuantizationType, columns: int
) -> bool:
    """Whether the products of a row with `weights` get other bits when it has company.

    weights: some rows of a matrix, [outputs, bytes per row].
    """
    rng = np.random.default_rng(21)
    outputs, rows = len(weights), 34
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    alone = [_product(api, weights, qtype, x[i : i + 1], outputs)[0] for i in (1, rows - 1)]
    for count in (rows, rows - 1):  # even and odd: some kernels take rows in pairs
        together = _product(api, weights, qtype, x[-count:], outputs)
        if not np.array_equal(together[[1 - rows, -1]], alone):
            return True
    return False


def close_to(found: Array, expected: NDArray[np.float64], nmse: float = MAX_NMSE) -> bool:
    """Normalized mean squared error at most `nmse` (and nothing NaN)."""
    error = np.square(found - expected).mean() / np.square(expected).mean()
    return bool(error <= nmse)


def _quantized(
    api: Ggml,
    rng: np.random.Generator,
    qtype: gguf.GGMLQuantizationType,
    rows: int,
    columns: int,
) -> NDArray[np.uint8]:
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    return quantize(api, values, qtype)


def _product(
    api: Ggml,
    weights: NDArray[np.uint8],
    qtype: gguf.GGMLQuantizationType,
    x: Array,
    outputs: int,
) -> Array:
    rows, columns = x.shape
    with Scratch(api) as s:
        w = s.tensor(weights, qtype, (outputs, columns))
        product = multiply_rows(api, s.context, w, s.tensor(x), columns, rows)
        return s.compute(product, (rows, outputs))


def _quantizes(api: Ggml, rng: np.random.Generator) -> bool:
    """Simple types byte for byte as gguf-py writes them, Q4_K close to what went in."""
    values = rng.standard_normal((4, 256)).astype(np.float32)
    exact = all(
        np.array_equal(quantize(api, values, qtype), quants.quantize(values, qtype).view(np.uint8))
        for qtype in (_TYPES.F16, _TYPES.Q8_0, _TYPES.Q4_0)
    )
    q4_k = quants.dequantize(quantize(api, values, _TYPES.Q4_K), _TYPES.Q4_K)
    return exact and close_to(q4_k, values.astype(np.float64), 1e-2)


def _multiplies(api: Ggml, rng: np.random.Generator) -> bool:
    x = rng.standard_normal((3, 256)).astype(np.float32)
    for qtype in (_TYPES.F32, _TYPES.F16, _TYPES.Q8_0, _TYPES.Q4_0, _TYPES.Q4_K, _TYPES.Q6_K):
        weights = _quantized(api, rng, qtype, 8, 256)
        exact = x.astype(np.float64) @ quants.dequantize(weights, qtype).astype(np.float64).T
        if not close_to(_product(api, weights, qtype, x, 8), exact):
            return False
    return True


def _normalizes(api: Ggml, rng: np.random.Generator) -> bool:
    """RMS norm times weight, SwiGLU, concatenation, clamp and addition in one graph."""
    x, y = rng.standard_normal((2, 3, 64)).astype(np.float32) * 4
    weight = rng.standard_normal(64).astype(np.float32)
    with Scratch(api) as s:
        a, b = s.tensor(x), s.tensor(y)
        normed = api.mul(s.context, api.rms_norm(s.context, a, 1e-6), s.tensor(weight))
        gated = api.swiglu_split(s.context, normed, api.clamp(s.context, b, -2.0, 2.0))
        joined = api.concat(s.context, gated, api.add(s.context, gated, gated), 1)
        found = s.compute(joined, (6, 64))
    x64 = x.astype(np.float64)
    normed64 = x64 / np.sqrt(np.square(x64).mean(-1, keepdims=True) + 1e-6) * weight
    gated64 = normed64 / (1 + np.exp(-normed64)) * np.clip(y, -2, 2)
    return close_to(found, np.concatenate([gated64, gated64 * 2]), 1e-10)


def _rotates(api: Ggml, rng: np.random.Generator) -> bool:
    """Halves and adjacent pairs, without and with frequency factors; YaRN by 4, whose ramp crosses
    the pairs of this head size."""
    heads, size, base, factor, original = 2, 32, 10000.0, 4.0, 4096
    x = rng.standard_normal((3, heads * size)).astype(np.float32)
    positions = np.array([0, 7, 5000], np.int32)
    pairs = np.arange(size // 2)
    low, high = (
        size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (32.0, 1.0)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
    kept = 1 - np.clip((pairs - low) / (high - low), 0, 1)
    factors = np.geomspace(1, 8, size // 2).astype(np.float32)
    for mode, divided in ((ROPE_HALVES, False), (ROPE_ADJACENT, True)):
        with Scratch(api) as s:
            rotated = api.rope_ext(
                s.context,
                api.reshape_3d(s.context, s.tensor(x), size, heads, 3),
                s.tensor(positions),
                s.tensor(factors) if divided else None,
                size,
                mode,
                original,
                base,
                1 / factor,
                1.0,
                1.0,
                32.0,
                1.0,
            )
            found = s.compute(rotated, (3, heads, size))
        speed = base ** (-2 * pairs / size) / (factors if divided else 1)
        angle = positions[:, None, None] * (speed / factor * (1 - kept) + speed * kept)
        cos, sin = (f(angle) * (1 + 0.1 * math.log(factor)) for f in (np.cos, np.sin))
        order = pairs * 2 if mode == ROPE_ADJACENT else pairs
        step = 1 if mode == ROPE_ADJACENT else size // 2
        values = x.reshape(3, heads, size).astype(np.float64)
        first, second = values[..., order], values[..., order + step]
        expected = np.empty_like(values)
        expected[..., order] = first * cos - second * sin
        expected[..., order + step] = second * cos + first * sin
        if not close_to(found, expected, 1e-6):
            return False
    return True


def _copies_rows(api: Ggml, rng: np.random.Generator) -> bool:
    """set_rows into a q8_0 tensor quantizes as ggml does; get_rows reads them back."""
    x = rng.standard_normal((2, 64)).astype(np.float32)
    with Scratch(api) as s:
        target = s.tensor(np.zeros((5, 68), np.uint8), _TYPES.Q8_0, (5, 64))
        s.first(api.set_rows(s.context, target, s.tensor(x), s.tensor(np.array([3, 1]))))
        rows = api.get_rows(s.context, target, s.tensor(np.array([1, 3, 0], np.int32)))
        found = s.compute(rows, (3, 64))
    expected = quants.dequantize(quants.quantize(x[[1, 0]], _TYPES.Q8_0), _TYPES.Q8_0)
    return np.array_equal(found, np.concatenate([expected, np.zeros((1, 64), np.float32)]))


def _attention_case(
    rng: np.random.Generator,
) -> tuple[Array, Array, Array, NDArray[np.float16], NDArray[np.float64]]:
    """q [2, 4, 32], k and v [64, 2, 32], mask [2, 64] that hides some keys, and the result."""
    q = rng.standard_normal((2, 4, 32)).astype(np.float32)
    k, v = rng.standard_normal((2, 64, 2, 32)).astype(np.float32)
    mask = np.zeros((2, 64), np.float16)
    mask[0, 40:] = mask[1, 41:] = -np.inf
    keys, values = (a.astype(np.float64).repeat(2, axis=1) for a in (k, v))
    scores = np.einsum("rhd,nhd->hrn", q, keys) / math.sqrt(32) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return q, k, v, mask, np.einsum("hrn,nhd->rhd", weights, values)


def _attends(api: Ggml, rng: np.random.Generator) -> bool:
    """Scores, softmax and weighted sum as three operations, values transposed, in F16."""
    q, k, v, mask, expected = _attention_case(rng)
    with Scratch(api) as s:
        c = s.context
        keys = s.tensor(k.transpose(1, 0, 2).astype(np.float16).reshape(128, 32))
        values = s.tensor(v.transpose(1, 2, 0).astype(np.float16).reshape(64, 64))
        queries = api.reshape_4d(c, s.tensor(q.reshape(2, 128)), 32, 1, 4, 2)
        scores = api.mul_mat(c, api.reshape_3d(c, keys, 32, 64, 2), queries)
        hidden = api.reshape_4d(c, s.tensor(mask), 64, 1, 1, 2)
        weights = api.soft_max_ext(c, scores, hidden, 1 / math.sqrt(32), 0.0)
        mixed = api.mul_mat(c, api.reshape_3d(c, values, 64, 32, 2), weights)
        return close_to(s.compute(mixed, (2, 4, 32)), expected)


def _flash_attends(api: Ggml, rng: np.random.Generator) -> bool:
    """The fused operation, with keys and values in Q8_0."""
    q, k, v, mask, expected = _attention_case(rng)
    with Scratch(api) as s:
        c = s.context
        keys, values = (
            api.reshape_3d(
                c,
                s.tensor(
                    quantize(api, a.transpose(1, 0, 2).reshape(128, 32), _TYPES.Q8_0),
                    _TYPES.Q8_0,
                    (128, 32),
                ),
                32,
                64,
                2,
            )
            for a in (k, v)
        )
        queries = api.reshape_3d(c, s.tensor(q.reshape(2, 128)), 32, 4, 2)
        queries = api.permute(c, queries, 0, 2, 1, 3)
        scale = 1 / math.sqrt(32)
        mixed = api.flash_attn_ext(c, queries, keys, values, s.tensor(mask), scale, 0.0, 0.0)
        return close_to(s.compute(mixed, (2, 4, 32)), expected)
