"""The small kernels in the interpreter, against torch in float64 and against gguf's quantizers."""

from __future__ import annotations

import dataclasses
import math

import gguf
import numpy as np
import pytest
import torch
from orthrus_kernels.attention.kv_cache import KvPlanes, dequantize_planes, new_planes
from orthrus_kernels.elementwise import ops
from orthrus_kernels.elementwise import plain as reference_ops
from orthrus_kernels.elementwise.activation_rows import Int8Rows, new_f16_rows, new_int8_rows
from orthrus_kernels.elementwise.activations import deinterleave, interleave
from orthrus_kernels.elementwise.embedding import QBLOCK_BYTES, embed, iq4_codebook
from orthrus_kernels.elementwise.rows import AR, DIFFUSION, UNUSED, Rows, new_rows, plan_rows
from torch import Tensor

from orthrus_gguf.model.config import Rope
from orthrus_gguf.runtime.reference import rope_frequencies

NAN = float("nan")
COUNTS = ("views", "tokens", "positions", "visible", "block_first", "block_stop")


def f16_rows(rows: int, columns: int) -> Tensor:
    """Zero padding, NaN where the kernel must write."""
    return interleave(torch.full((rows, columns), NAN, dtype=torch.float16))


def int8_rows(rows: int, columns: int, *, groups_first: bool = False) -> Int8Rows:
    """Poisoned; optionally with groups as the outermost dimension, as some products want them."""
    out = new_int8_rows(rows, columns, "cpu")
    if groups_first:
        planes = (out.quants, out.scales, out.sums)
        moved = (p.transpose(0, 1).contiguous().transpose(0, 1) for p in planes)
        out = Int8Rows(*moved)
    out.quants.fill_(-128)
    out.scales.fill_(NAN)
    out.sums.fill_(NAN)
    return out


def assert_close_rows(found: Int8Rows, wanted: Int8Rows) -> None:
    """Equal but for a step where a value lies on the edge between two."""
    torch.testing.assert_close(found.scales, wanted.scales, rtol=1e-6, atol=0)
    steps = (found.quants.int() - wanted.quants.int()).abs()
    assert steps.max() <= 1
    assert steps.float().mean() < 1e-3
    sums = found.scales * found.quants.float().sum(-1)
    torch.testing.assert_close(found.sums, sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "n", "splits"), [(1, 1024, 0), (5, 160, 3), (31, 96, 1), (3, 5120, 4)]
)
@pytest.mark.parametrize("int8", [False, True])
def test_residual_norm(rows: int, n: int, splits: int, int8: bool) -> None:
    torch.manual_seed(n)
    partials = torch.randn(splits, rows, n) if splits else None
    residual, weight = torch.randn(rows, n) * 10, torch.randn(n)
    found_x, wanted_x = residual.clone(), residual.clone()
    make = int8_rows if int8 else f16_rows
    found, wanted = make(rows, n), make(rows, n)
    ops.residual_norm(partials, found_x, weight, 1e-6, found)
    reference_ops.residual_norm(partials, wanted_x, weight, 1e-6, wanted)
    torch.testing.assert_close(found_x, wanted_x, rtol=1e-6, atol=1e-5)
    if isinstance(found, Int8Rows) and isinstance(wanted, Int8Rows):
        assert_close_rows(found, wanted)
    elif isinstance(found, Tensor) and isinstance(wanted, Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    alone_x, alone = residual[:1].clone(), make(1, n)
    first = None if partials is None else partials[:, :1].contiguous()
    ops.residual_norm(first, alone_x, weight, 1e-6, alone)
    assert torch.equal(alone_x[0], found_x[0]), "a row alone has the same bits"


def test_split_sums_are_ordered() -> None:
    """1e8 - 1e8 + 1 is 1 from left to right, and 0 in any other order."""
    partials = torch.tensor([1e8, -1e8, 1.0]).view(3, 1, 1).expand(3, 2, 64).contiguous()
    residual = torch.zeros(2, 64)
    ops.residual_norm(partials, residual, torch.ones(64), 0.0, f16_rows(2, 64))
    assert torch.equal(residual, torch.ones(2, 64))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(("rows", "n", "splits"), [(1, 1024, 1), (5, 1120, 2)])
@pytest.mark.parametrize("int8", [False, True])
def test_silu_multiply(rows: int, n: int, splits: int, int8: bool) -> None:
    torch.manual_seed(n)
    gate, up = (torch.randn(splits, rows, n) * 5 for _ in range(2))
    gate[0, 0, :4] = torch.tensor([90.0, -90.0, -104.0, 0.0])  # exp() at its ends
    if int8:
        found8 = int8_rows(rows, n, groups_first=True)
        wanted8 = int8_rows(rows, n)
        ops.silu_multiply(gate, up, found8)
        reference_ops.silu_multiply(gate, up, wanted8)
        assert_close_rows(found8, wanted8)
    else:
        found, wanted = f16_rows(rows, n), f16_rows(rows, n)
        ops.silu_multiply(gate, up, found)
        reference_ops.silu_multiply(gate, up, wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_f16_rows_stay_finite() -> None:
    gate, up = torch.full((1, 1, 32), 3e4), torch.full((1, 1, 32), -3e4)
    out = f16_rows(1, 32)
    ops.silu_multiply(gate, up, out)
    assert torch.equal(deinterleave(out, 32), torch.full((1, 32), -65504.0).half())
    assert not deinterleave(new_f16_rows(1, 32, "cpu"), 256).any()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_quantize_rows(scale: float) -> None:
    x = torch.randn(3, 1056, generator=torch.Generator().manual_seed(1)) * scale
    found, wanted = int8_rows(3, 1056), int8_rows(3, 1056)
    ops.quantize_rows(x, found)
    reference_ops.quantize_rows(x, wanted)
    assert_close_rows(found, wanted)
    error = (found.quants * found.scales[..., None] - x.view(3, -1, 32)).abs()
    assert (error <= found.scales[..., None] * 0.5001).all()


def some_rows(head_dim: int) -> Rows:
    """Two AR rows at 5 and 6, two diffusion rows, an unused one; random rotations."""
    rows = new_rows(5, head_dim, "cpu")
    rows.views.copy_(torch.tensor([AR, AR, DIFFUSION, DIFFUSION, UNUSED]))
    rows.positions.copy_(torch.tensor([5, 6, 7, 8, 0]))
    angles = torch.rand(5, head_dim // 2, generator=torch.Generator().manual_seed(0)) * 6.28
    return dataclasses.replace(rows, cos=angles.cos(), sin=angles.sin())


def sentinel_planes(type_name: str, head_dim: int, capacity: int) -> KvPlanes:
    planes = new_planes(type_name, 2, capacity, head_dim, "cpu")
    planes.values.fill_(77)
    planes.scales.fill_(77)
    return planes


@pytest.mark.parametrize(
    ("type_name", "head_dim"),
    [("f16", 80), ("f16", 128), ("q8_0", 64), ("q8_0", 96), ("q4_0", 96), ("q4_0", 128)],
)
def test_finish_qkv(type_name: str, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    rows, n_head = some_rows(head_dim), 4
    partials = torch.randn(2, 5, (n_head + 4) * head_dim)
    norms = torch.randn(2, 2, head_dim)
    results = []
    for implementation in (ops.finish_qkv, reference_ops.finish_qkv):
        q = torch.full((5, n_head, head_dim), NAN, dtype=torch.float16)
        caches = [sentinel_planes(type_name, head_dim, 9) for _ in "kv"]
        blocks = [sentinel_planes("f16", head_dim, 5) for _ in "kv"]
        implementation(partials, norms, 1e-6, rows, q, *caches, *blocks)
        results.append((q, caches, blocks))
    (q, caches, blocks), (wanted_q, wanted_caches, wanted_blocks) = results
    torch.testing.assert_close(q, wanted_q, rtol=2e-3, atol=1e-5)
    for found, wanted in zip(blocks + caches, wanted_blocks + wanted_caches, strict=True):
        size = 2 / 127 if found.type_name == "q8_0" else 1 / 4
        tolerance = 2e-3 if found.type_name == "f16" else size
        a, b = dequantize_planes(found), dequantize_planes(wanted)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-5)
        assert (found.values != wanted.values).float().mean() < 2e-3
    untouched = caches[0].values[:, [0, 4, 7, 8]]
    assert torch.equal(untouched, torch.full_like(untouched, 77)), "only AR rows are cached"


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
def test_cache_quantization_is_ggmls(type_name: str) -> None:
    """The stored numbers are, bit for bit, those of gguf's quantizer (and so of llama.cpp)."""
    rows, rng = some_rows(64), np.random.default_rng(0)
    v = rng.standard_normal((5, 2, 64)).astype(np.float32)
    v[0, 0, :32] = 0
    v[0, 1, 3:9] = [4, -4, 4, -4, 3.5, -4]  # a draw: the first one gives the sign
    v[1, 0, :32] *= 1e-6  # a scale in f16's subnormals
    v[1, 1, 32:64] = np.arange(32) - 15.5
    partials = torch.zeros(1, 5, 6 * 64)
    partials[0, :, -128:] = torch.from_numpy(v.reshape(5, 128))
    keys, values = (sentinel_planes(type_name, 64, 9) for _ in "kv")
    blocks = [sentinel_planes("f16", 64, 5) for _ in "kv"]
    q = torch.empty(5, 2, 64, dtype=torch.float16)
    ops.finish_qkv(partials, torch.ones(2, 2, 64), 1e-6, rows, q, keys, values, *blocks)

    kind = gguf.GGMLQuantizationType[type_name.upper()]
    raw = gguf.quants.quantize(v[:2].reshape(4, 64), kind)
    wanted = gguf.quants.dequantize(raw, kind).reshape(2, 2, 64)
    found = dequantize_planes(values)[:, 5:7].transpose(0, 1)
    assert np.array_equal(found.numpy(), wanted)


def rope_angles(frequencies: Tensor, position: int) -> list[float]:
    """Angles in [-pi, pi], reduced in 64-bit-mantissa arithmetic or better."""
    exact = [math.remainder(position * f, 2 * math.pi) for f in frequencies.tolist()]
    wide = np.remainder(
        np.longdouble(position) * frequencies.numpy().astype(np.longdouble),
        2 * np.longdouble("3.14159265358979323846264338327950288"),
    )
    assert np.allclose(np.cos(exact), np.cos(wide.astype(np.float64)), atol=1e-9)
    return [float(a) for a in wide]


@pytest.mark.parametrize("position", [0, 1, 4097, 131_071, 262_144, 1_048_575])
@pytest.mark.parametrize(
    "rope",
    [Rope(1e6), Rope(1e6, factor=4.0, original_context=32768, ext_factor=1.0)],
    ids=["default", "yarn"],
)
def test_rope_is_accurate_far_out(rope: Rope, position: int) -> None:
    """Half a unit in the last place of f32 at position 262,144, where f32 angles are 0.01 off."""
    frequencies, scale = rope_frequencies(rope, 128)
    rows = new_rows(1, 128, "cpu")
    state = torch.zeros(8, dtype=torch.int32)
    state[0] = position
    segments = torch.tensor([[DIFFUSION, 0, 1, 0, 0]], dtype=torch.int32)
    history = torch.zeros(4, dtype=torch.int32)
    plan_rows(state, history, segments, history, 0, 1 << 21, frequencies, scale, rows)
    angles = rope_angles(frequencies, position)
    for found, function in ((rows.cos, math.cos), (rows.sin, math.sin)):
        wanted = torch.tensor([function(a) * scale for a in angles], dtype=torch.float64)
        assert (found[0].double() - wanted).abs().max() < 1.2e-7 * scale


def test_plan_rows() -> None:
    """A fused pass near the end of the context, written out by hand."""
    state = torch.tensor([10, 0, 99, 0, 0, 0, 0, 0], dtype=torch.int32)
    history = torch.arange(100, 120, dtype=torch.int32)
    segments = torch.tensor(
        [[AR, 0, 4, 0, -1], [DIFFUSION, 4, 3, 2, -1], [DIFFUSION, 7, 2, 1, 1]], dtype=torch.int32
    )
    alternatives = torch.tensor([500, 501], dtype=torch.int32)
    inv_freq = torch.ones(32, dtype=torch.float64)
    planned = []
    for implementation in (plan_rows, reference_ops.plan_rows):
        rows = new_rows(11, 64, "cpu")
        rows.cos.fill_(NAN)
        rows.sin.fill_(NAN)
        implementation(state, history, segments, alternatives, 9, 13, inv_freq, 1.0, rows)
        planned.append(rows)
        by_hand = {
            # Position 13 is past the capacity: the last AR row is unused.
            "views": [0, 0, 0, -1, 1, 1, 1, 1, 1, -1, -1],
            "tokens": [110, 111, 112, 0, 112, 9, 9, 501, 9, 0, 0],
            "positions": [10, 11, 12, 0, 12, 13, 14, 11, 12, 0, 0],
            "visible": [11, 12, 13, 0, 12, 12, 12, 11, 11, 0, 0],
            "block_first": [0, 0, 0, 0, 4, 4, 4, 7, 7, 0, 0],
            "block_stop": [0, 0, 0, 0, 7, 7, 7, 9, 9, 0, 0],
        }
        for name in COUNTS:
            assert getattr(rows, name).tolist() == by_hand[name], name
    torch.testing.assert_close(planned[0].cos, planned[1].cos, rtol=0, atol=1e-7)
    torch.testing.assert_close(planned[0].sin, planned[1].sin, rtol=0, atol=1e-7)


SCALE_OFFSETS = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
}


@pytest.mark.parametrize("type_name", QBLOCK_BYTES)
def test_embedding_rows(type_name: str) -> None:
    """Random bytes (finite scales) in, exactly the numbers of gguf's dequantizer out."""
    rng = np.random.default_rng(3)
    elements, size = QBLOCK_BYTES[type_name]
    n, vocab = 768, 7
    raw = rng.integers(0, 256, (vocab, n // elements, size), dtype=np.uint8)
    if elements == 1:
        numbers = rng.standard_normal((vocab, n)).astype(np.float32)
        if type_name == "F16":
            numbers = numbers.astype(np.float16)
        raw = numbers.view(np.uint8).reshape(vocab, n, -1)[..., -size:]
    else:
        for offset in SCALE_OFFSETS.get(type_name, (0,)):
            scales = rng.standard_normal((*raw.shape[:2], 1)).astype("<f2")
            raw[..., offset : offset + 2] = scales.view(np.uint8)
    table = np.ascontiguousarray(raw.reshape(vocab, -1))
    wanted = gguf.quants.dequantize(table, gguf.GGMLQuantizationType[type_name])
    tokens, out = torch.tensor([3, 0, 6, 3], dtype=torch.int32), torch.full((4, n), NAN)
    embed(torch.from_numpy(table), type_name, tokens, iq4_codebook("cpu"), out)
    assert np.array_equal(out.numpy(), wanted[[3, 0, 6, 3]])


def test_embedding_errors() -> None:
    table, tokens = torch.zeros(2, 18, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="Q8_K: expected one of"):
        embed(table, "Q8_K", tokens, iq4_codebook("cpu"), torch.empty(1, 32))
    with pytest.raises(ValueError, match="64 elements of Q4_0 take 36 bytes, the table has 18"):
        embed(table, "Q4_0", tokens, iq4_codebook("cpu"), torch.empty(1, 64))
