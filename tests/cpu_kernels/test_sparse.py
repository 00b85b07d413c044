"""Sparse attention of the C kernels, and the weights that rows give, against plain numpy."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import pytest
from cpu_models import kernels
from numpy.typing import NDArray
from orthrus_cpu_kernels import library as k

from orthrus_gguf.runtime.cache_layout import CACHE_TYPES, CacheLayout
from orthrus_gguf.runtime.cpu.cache import CpuCache

BLOCK, SINKS, WINDOW = 128, 1, 4
HEADS, KV_HEADS, DIM, ROWS = 4, 2, 32, 20
SCALE = DIM**-0.5

Floats = NDArray[np.float32]


class Case(NamedTuple):
    """Queries [ROWS, HEADS, DIM] at the end of keys and values [columns, KV_HEADS, DIM]."""

    q: Floats
    keys: Floats
    values: Floats


def case(columns: int, leaning: tuple[int, ...] = ()) -> Case:
    """leaning: blocks whose keys all queries like."""
    rng = np.random.default_rng(columns)
    draw = rng.normal(size=(3, columns, KV_HEADS, DIM)).astype(np.float32)
    q = rng.normal(size=(ROWS, HEADS, DIM)).astype(np.float32)
    for rank, block in enumerate(leaning):
        draw[1, block * BLOCK : (block + 1) * BLOCK, :, :4] += 3 - rank / 2
    q[..., :4] += 2
    return Case(q, draw[1], draw[2])


def taken(case: Case, kv: int, count: int) -> NDArray[np.int64]:
    """Columns that the rows of a key/value head may see."""
    columns = len(case.keys)
    stop = (columns - ROWS) // BLOCK - WINDOW
    if not count or stop - SINKS <= count:
        return np.arange(columns)
    means = case.keys[SINKS * BLOCK : stop * BLOCK, kv].reshape(-1, BLOCK, DIM).mean(axis=1)
    group = HEADS // KV_HEADS
    scores = case.q[:, kv * group : (kv + 1) * group].reshape(-1, DIM) @ means.T * SCALE
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    mass = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
    chosen = {*range(SINKS), *(SINKS + np.argsort(-mass, kind="stable")[:count])}
    return np.array([c for c in range(columns) if c // BLOCK in chosen or c // BLOCK >= stop])


def expected(case: Case, count: int) -> tuple[Floats, Floats]:
    """What attention gives [ROWS, HEADS, DIM]; weights over all columns [KV_HEADS, ROWS, columns].

    The weights are the largest of the heads of a group; they know nothing of `count`."""
    columns = len(case.keys)
    mixed, largest = np.zeros_like(case.q), np.zeros((KV_HEADS, ROWS, columns), np.float32)
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        for row in range(ROWS):
            sees = columns - ROWS + row + 1
            scores = case.keys[:sees, kv] @ case.q[row, head] * SCALE
            weights = np.exp(scores - scores.max())
            line = largest[kv, row, :sees]
            np.maximum(line, weights / weights.sum(), out=line)
            some = taken(case, kv, count)
            some = some[some < sees]
            share = weights[some] / weights[some].sum()
            mixed[row, head] = share @ case.values[some, kv]
    return mixed, largest


def computed(case: Case, count: int, type_name: str) -> tuple[Floats, Floats]:
    """The same by the kernels."""
    columns, qtype = len(case.keys), CACHE_TYPES[type_name]
    cache = CpuCache(CacheLayout(qtype, qtype, 1, KV_HEADS, DIM), columns, 16)
    library, form = kernels().library, np.zeros((ROWS, HEADS * DIM), np.float32)
    qkv = np.zeros((columns, (HEADS + 2 * KV_HEADS) * DIM), np.float32)
    qkv[-ROWS:, : HEADS * DIM] = case.q.reshape(ROWS, -1)
    qkv[:, HEADS * DIM : (HEADS + KV_HEADS) * DIM] = case.keys.reshape(columns, -1)
    qkv[:, (HEADS + KV_HEADS) * DIM :] = case.values.reshape(columns, -1)
    angles = np.concatenate([np.ones(DIM // 2, np.float32), np.zeros(DIM // 2, np.float32)])
    rows = np.zeros(columns, k.ROW)
    rows["key"], rows["sees"] = np.arange(columns), np.arange(columns) + 1
    rows["cos"], rows["sin"] = angles.ctypes.data, angles[DIM // 2 :].ctypes.data
    group = np.array([(0, ROWS)], k.GROUP)
    planes = np.zeros((KV_HEADS, ROWS, -(-columns // 16) * 16), np.float32)

    def run(op: int, tasks: int, **values: Any) -> None:
        step = k.Step(op=op, tasks=tasks, n_head=HEADS, n_head_kv=KV_HEADS, head_dim=DIM)
        step.cache, step.scale, step.width = cache.layers.ctypes.data, SCALE, DIM
        for name, value in values.items():
            setattr(step, name, value)
        library.orthrus_run_here(ctypes.addressof(step))

    first = qkv[-ROWS:]
    stride = qkv.shape[1]
    last = rows[-ROWS:].ctypes.data
    run(k.HEADS, columns, y=qkv.ctypes.data, y_stride=stride, row=rows.ctypes.data)
    run(
        k.ATTENTION, KV_HEADS, x=first.ctypes.data, x_stride=stride, y=form.ctypes.data,
        y_stride=HEADS * DIM, row=last, group=group.ctypes.data, groups=1, count=count,
    )  # fmt: skip
    run(
        k.WEIGHTS, KV_HEADS, x=first.ctypes.data, x_stride=stride, y=planes.ctypes.data,
        y_stride=planes.shape[2], rows=ROWS, row=last,
    )  # fmt: skip
    assert not planes[:, :, columns:].any()
    return form.reshape(ROWS, HEADS, DIM), planes[:, :, :columns]


@pytest.mark.parametrize("type_name", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("columns", [ROWS, 700, 1411])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_they_are_plain_numpys(type_name: str, columns: int, count: int) -> None:
    """With few columns all are taken. Quantized keys are others, so that only what rows lean on
    clearly is the same."""
    chosen = case(columns, leaning=(4, 2, 3))
    mixed, weights = computed(chosen, count, type_name)
    wanted_mixed, wanted_weights = expected(chosen, count)
    if type_name == "q4_0":  # so coarse that single rows say little
        assert np.abs(mixed - wanted_mixed).mean() < 0.06
        assert np.abs(weights - wanted_weights).sum(axis=2).mean() < 0.5
        return
    near = {"f32": 1e-5, "f16": 3e-3, "q8_0": 3e-2}[type_name]
    np.testing.assert_allclose(mixed, wanted_mixed, rtol=0, atol=near)
    np.testing.assert_allclose(weights, wanted_weights, rtol=0, atol=near)


def test_what_is_left_out_matters() -> None:
    """So that the test above tells sparse attention from all of it."""
    chosen = case(1411, leaning=(4, 2, 3))
    whole, one = (expected(chosen, count)[0] for count in (0, 1))
    assert np.abs(whole - one).max() > 0.02
    assert len(taken(chosen, 0, 1)) < len(taken(chosen, 0, 3)) < 1411
