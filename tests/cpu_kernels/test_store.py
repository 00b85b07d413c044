"""What a cache holds of keys and values: the numbers of GGUF's own quantizers."""

from __future__ import annotations

import ctypes
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from orthrus_cpu_kernels import library
from orthrus_cpu_kernels.library import LANES, Kernels, Step
from synthetic_model import model_shape

from orthrus_gguf.runtime.cache_layout import CACHE_TYPES, cache_layout
from orthrus_gguf.runtime.cpu.cache import CpuCache

TYPES = gguf.GGMLQuantizationType
HEADS, SIZE = 2, 96
COLUMNS = (0, 3, 15, 16, 77)


def stored(kernels: Kernels, name: str, k: Any, v: Any) -> CpuCache:
    """A cache with rows of keys and values [rows, HEADS, SIZE] at COLUMNS; nothing is turned."""
    config = model_shape(n_layers=1, n_head=1, n_head_kv=HEADS, head_dim=SIZE)
    cache = CpuCache(cache_layout(config, name, name), 100, 16)
    rows = np.zeros(len(COLUMNS), library.ROW)
    cos, sin = np.ones(SIZE // 2, np.float32), np.zeros(SIZE // 2, np.float32)
    rows["key"], rows["cos"], rows["sin"] = COLUMNS, cos.ctypes.data, sin.ctypes.data
    q = np.zeros((len(COLUMNS), 1, SIZE))
    qkv = np.concatenate([q, k, v], axis=1).astype(np.float32).reshape(len(COLUMNS), -1).copy()
    step = Step(op=library.HEADS, tasks=len(COLUMNS))
    step.n_head, step.n_head_kv, step.head_dim = 1, HEADS, SIZE
    step.y, step.y_stride = qkv.ctypes.data, qkv.shape[1]
    step.row, step.cache = rows.ctypes.data, cache.layers.ctypes.data
    steps = library.steps_array([step])
    pool = kernels.library.orthrus_pool_new(2)
    assert kernels.library.orthrus_run(pool, ctypes.addressof(steps), 1) == 0
    kernels.library.orthrus_pool_free(pool)
    return cache


def keys(cache: CpuCache, column: int) -> list[NDArray[Any]]:
    """Parts of the keys of a column [HEADS, blocks, elements]: scales and codes, or numbers."""
    panel, lane = divmod(column, LANES)
    names = cache.keys.dtype.names
    assert names is not None
    return [cache.keys[name][0, :, panel, :, :, lane] for name in names]


def blocks(kind: TYPES, x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Heads [HEADS, SIZE] as GGUF's blocks [HEADS, blocks, bytes]."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    raw: NDArray[np.uint8] = gguf.quants.quantize(x, kind).reshape(HEADS, -1, size)
    return raw


@pytest.mark.parametrize("name", CACHE_TYPES)
@pytest.mark.parametrize("size", [1.0, 3e-3, 500.0, 1e-7])
def test_keys_and_values_are_ggufs(portable: Kernels, name: str, size: float) -> None:
    """Codes next to a tie may go the other way; scales are the same bits."""
    rng = np.random.default_rng(1)
    k, v = (size * rng.standard_normal((len(COLUMNS), HEADS, SIZE)) for _ in range(2))
    cache = stored(portable, name, k, v)
    kind = CACHE_TYPES[name]
    for row, column in enumerate(COLUMNS):
        for own, x in ((keys(cache, column), k[row]), (None, v[row])):
            x32 = x.astype(np.float32)
            if kind in (TYPES.F32, TYPES.F16):
                number = np.float32 if kind is TYPES.F32 else np.float16
                found = cache.values[0, :, column].view(number) if own is None else own[0][..., 0]
                np.testing.assert_array_equal(found, x32.astype(number))
                continue
            expected = blocks(kind, x32)
            found = cache.values[0, :, column].reshape(expected.shape)
            if own is not None:
                scales, codes = own
                found = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1)
            np.testing.assert_array_equal(found[..., :2], expected[..., :2])
            ours, theirs = (
                gguf.quants.dequantize(np.ascontiguousarray(raw).reshape(HEADS, -1), kind)
                for raw in (found, expected)
            )
            step = np.abs(found[..., :2].copy().view(np.float16).astype(np.float64)).max()
            assert np.abs(ours - theirs).max() <= step * 1.001
            assert (ours != theirs).mean() < 0.01
            # Half a step and a scale rounded to F16; of -8..7, the other end is a step away.
            most = 0.57 if kind is TYPES.Q8_0 else 1.01
            rounding = 128 * 2**-25 if size < 1e-6 else 0  # of a scale that is subnormal
            assert np.abs(ours - x32).max() <= most * step + rounding


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_what_does_not_fit_is_clamped(portable: Kernels, name: str) -> None:
    wild = np.array([np.inf, -np.inf, np.nan, 1e38, -1e38, 65504.0, 0.0, -0.0])
    x = np.resize(wild, (len(COLUMNS), HEADS, SIZE))
    cache = stored(portable, name, x, x)
    assert np.isfinite(
        cache.values.view(np.float16 if name != "f32" else np.float32)[0, :, 3].astype(float)[:, :1]
    ).all()
    for part in keys(cache, 3):
        assert np.isfinite(part.astype(np.float64)).all()
    if name in ("f16", "f32"):
        number = np.float16 if name == "f16" else np.float32
        held = cache.values[0, 0, 3].view(number)[:8].astype(np.float64)
        assert held.tolist() == [65504, -65504, -65504, 65504, -65504, 65504, 0, 0]


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_zeros_and_subnormals(portable: Kernels, name: str) -> None:
    for x in (np.zeros(SIZE), np.full(SIZE, 1e-41), np.full(SIZE, -1e-37)):
        rows = np.broadcast_to(x, (len(COLUMNS), HEADS, SIZE))
        cache = stored(portable, name, rows, rows)
        for part in keys(cache, 16)[:1]:
            assert np.abs(part.astype(np.float64)).max() <= 1e-36


def test_columns_in_between_stay_as_they_are(portable: Kernels) -> None:
    x = np.ones((len(COLUMNS), HEADS, SIZE))
    for name in CACHE_TYPES:
        cache = stored(portable, name, x, x)
        for column in (1, 2, 14, 17, 76, 78, 99):
            assert not any(part.any() for part in keys(cache, column))
            assert not cache.values[0, :, column].any()
