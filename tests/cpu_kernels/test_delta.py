"""Gated DeltaNet: the kernels against numpy in float64, with heads as released models have them.

Bits across objects: `test_other_machines.py`. Cuts, drafts, trees: `tests/runtime`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from orthrus_cpu_kernels import library as k
from orthrus_cpu_kernels.library import Kernels, Step

Array = NDArray[np.float32]

KEYS, VALUES, SIZE, ROWS = 2, 6, 128, 9
CHANNELS, INNER = (2 * KEYS + VALUES) * SIZE, VALUES * SIZE
GATES = 16  # of a row: VALUES, to whole vectors
RECORD = CHANNELS + (KEYS + VALUES) * SIZE + GATES
RECORDS = 3 + ROWS


@dataclass
class Layer:
    """Weights; inputs of rows, inputs | gates | alpha | beta; and a state."""

    conv: Array
    a: Array
    dt: Array
    norm: Array
    x: Array
    memory: Array
    back: Array

    @classmethod
    def random(cls, seed: int, alpha: float = 1.0, size: float = 1.0) -> Layer:
        """alpha: what gates are multiplied by; size: q, k and v."""
        rng = np.random.default_rng(seed)

        def some(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        x = some(ROWS, CHANNELS + INNER + 2 * GATES)
        x[:, :CHANNELS] *= size
        x[:, CHANNELS + INNER :] *= alpha
        return cls(
            conv=some(CHANNELS, 4),
            a=-np.exp(some(VALUES)),
            dt=some(VALUES),
            norm=some(SIZE),
            x=x,
            memory=some(VALUES, SIZE, SIZE) / np.float32(8),
            back=some(3, CHANNELS) * np.float32(size),
        )

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Outputs [ROWS, INNER] and the state behind all rows."""
        x = self.x.astype(np.float64)
        window, memory, out = [*self.back.astype(np.float64)], self.memory.astype(np.float64), []
        for row in x:
            window = [*window, row[:CHANNELS]][-4:]
            mixed = silu((self.conv.T * np.array(window)).sum(0))
            q, key, v = np.split(mixed, [KEYS * SIZE, 2 * KEYS * SIZE])
            q, key = (unit(part.reshape(KEYS, SIZE)) for part in (q, key))
            z, alpha, beta = np.split(row[CHANNELS:], [INNER, INNER + GATES])
            decay = np.exp(self.a * np.logaddexp(0, alpha[:VALUES] + self.dt))
            told = np.empty((VALUES, SIZE))
            for head in range(VALUES):
                own = memory[head] * decay[head]
                at = head % KEYS
                change = sigmoid(beta[head]) * (v.reshape(VALUES, SIZE)[head] - key[at] @ own)
                memory[head] = own + np.outer(key[at], change)
                told[head] = q[at] @ memory[head] / SIZE**0.5
            scale = np.sqrt((told**2).mean(1, keepdims=True) + 1e-6)
            out.append(told / scale * self.norm * silu(z.reshape(VALUES, SIZE)))
        return np.array(out).reshape(ROWS, INNER), memory


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.exp(-np.logaddexp(0, -x))
    return found


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * sigmoid(x)


def unit(heads: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = heads / np.sqrt((heads**2).sum(-1, keepdims=True) + 1e-6)
    return found


def tiles(memory: NDArray[Any]) -> NDArray[Any]:
    """A state as the kernels have it, in tiles of columns."""
    columns = k.WIDE * k.LANES
    apart = memory.reshape(VALUES, SIZE, SIZE // columns, columns).swapaxes(1, 2)
    return np.ascontiguousarray(apart)


def computed(kernels: Kernels, layer: Layer, *, advance: bool) -> tuple[Array, Array]:
    """Outputs, and the state behind all rows: of the pass, or of one that applies its records."""
    pad = GATES - VALUES
    taps = np.ascontiguousarray(layer.conv.reshape(-1, 16, 4).transpose(0, 2, 1))
    a, dt = np.pad(layer.a, (0, pad)), np.pad(layer.dt, (0, pad))
    convolved = np.zeros((ROWS, CHANNELS + 2 * GATES), np.float32)
    y = np.zeros((ROWS, INNER), np.float32)
    records = np.full((RECORDS, RECORD), np.nan, np.float32)
    records[:3, :CHANNELS] = layer.back
    memory = tiles(layer.memory)
    quantized = np.zeros((ROWS, INNER), np.float32)

    rows, state, run = (
        np.zeros(n, t) for n, t in ((ROWS, k.STATE_ROW), (1, k.LAYER_STATE), (1, k.RUN))
    )
    at = np.arange(ROWS)[:, None] - np.arange(1, 4)
    rows["back"] = np.where(at >= 0, at, -1 - (3 + at))
    rows["record"], rows["follows"] = -1 if advance else 3 + np.arange(ROWS), 1
    state["memory"], state["records"] = memory.ctypes.data, records.ctypes.data
    run["count"], run["advance"] = ROWS, advance

    def step(op: int, tasks: int, x: Array, to: Array) -> Step:
        one = Step(op=op, tasks=tasks, n_head=VALUES, n_head_kv=KEYS, head_dim=SIZE, epsilon=1e-6)
        one.x, one.x_stride, one.y = x.ctypes.data, layer.x.shape[1], to.ctypes.data
        one.y_stride, one.state_row = to.shape[1], rows.ctypes.data
        one.state, one.run = state.ctypes.data, run.ctypes.data
        return one

    parts = -(-(2 * KEYS + VALUES) // k.HEADS_PER_TASK)
    convolve = step(k.CONVOLVE, ROWS * parts, layer.x, convolved)
    convolve.weight, convolve.weight_k, convolve.bias[0] = (
        *(taps.ctypes.data, a.ctypes.data, dt.ctypes.data),
    )
    tasks = VALUES * SIZE // (k.WIDE * k.LANES)
    recur = step(k.RECUR, tasks, convolved, y)
    recur.x_stride = convolved.shape[1]
    norm = step(k.GATED_NORM, ROWS, layer.x[:, CHANNELS:], y)
    norm.weight, norm.form, norm.q = layer.norm.ctypes.data, k.FORM_FLOAT, quantized.ctypes.data
    for one in (convolve, recur, norm):
        kernels.library.orthrus_run_here(ctypes.addressof(one))
    if not advance:  # the state is as it was; what the rows do to it follows
        np.testing.assert_array_equal(memory, tiles(layer.memory))
        apply = np.arange(3, 3 + ROWS, dtype=np.int32)
        run["count"], run["applied"], run["apply"] = 0, ROWS, apply.ctypes.data
        kernels.library.orthrus_run_here(ctypes.addressof(recur))
    np.testing.assert_array_equal(quantized, y)
    return y, memory


@pytest.mark.parametrize(
    ("alpha", "size"), [(1, 1), (0, 1), (30, 1), (100, 1), (1, 1e-4), (1, 1e3)], ids=str
)
def test_rows_and_state_are_numpys(objects: dict[str, Kernels], alpha: float, size: float) -> None:
    """Ordinary gates, open and shut ones; inputs whose length is next to nothing, and large ones.
    The state is the same bits whether the rows changed it at once or later."""
    layer = Layer.random(3, alpha, size)
    out, memory = layer.expected()
    assert np.abs(out).max() > 1
    for name, kernels in objects.items():
        found, at_once = computed(kernels, layer, advance=True)
        again, later = computed(kernels, layer, advance=False)
        np.testing.assert_array_equal(at_once, later, name)
        np.testing.assert_array_equal(found, again, name)
        for ours, theirs in ((found, out), (at_once, tiles(memory))):
            close = 2e-5 * float(np.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=close, err_msg=name)
