"""The small kernels in the interpreter, against torch in float64 and against gguf's quantizers."""

from __future__ import annotations

import dataclasses
import math

import gguf
import numpy as np
import pytest
import torch
from orthrus_kernels.attention import plain as reference_attention
from orthrus_kernels.attention.finish_qkv import HeadWeights, finish_qkv
from orthrus_kernels.attention.kv_cache import (
    Caches,
    KvPlanes,
    cache_entry,
    dequantize_planes,
    move_columns,
    new_planes,
)
from orthrus_kernels.elementwise import ops
from orthrus_kernels.elementwise import plain as reference_ops
from orthrus_kernels.elementwise.activation_rows import Int8Rows, new_f16_rows, new_int8_rows
from orthrus_kernels.elementwise.activations import deinterleave, interleave
from orthrus_kernels.elementwise.embedding import QBLOCK_BYTES, embed, iq4_codebook
from orthrus_kernels.elementwise.rows import AR, DIFFUSION, UNUSED, Rows, rotary_angles
from pass_rows import rows_of
from torch import Tensor

from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.rope import frequencies as rope_frequencies

NAN = float("nan")

#: What offsets of caches count from.
ANCHOR = torch.zeros(64, dtype=torch.uint8)


def f16_rows(rows: int, columns: int) -> Tensor:
    """Zero padding, NaN where the kernel must write."""
    return interleave(torch.full((rows, columns), NAN, dtype=torch.float16))


def int8_rows(rows: int, columns: int, *, rows_first: bool = False) -> Int8Rows:
    """Poisoned; optionally with rows as the outermost dimension, which kernels take too."""
    out = new_int8_rows(rows, columns, "cpu")
    if rows_first:
        out = Int8Rows(*(part.contiguous() for part in (out.quants, out.scales, out.sums)))
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


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("int8", [False, True])
def test_residual_norm_of_some_rows(splits: int, int8: bool) -> None:
    """Rows may be taken twice, and the residual stays: the bits are those of the whole."""
    torch.manual_seed(splits)
    partials = torch.randn(splits, 6, 288) if splits else None
    residual, weight = torch.randn(6, 288) * 10, torch.randn(288)
    index = torch.tensor([4, 0, 4, 5], dtype=torch.int32)
    make = int8_rows if int8 else f16_rows
    whole, some, plain = make(6, 288), make(4, 288), make(4, 288)
    kept = residual.clone()
    ops.residual_norm(partials, kept, weight, 1e-6, some, index)
    reference_ops.residual_norm(partials, kept, weight, 1e-6, plain, index)
    assert torch.equal(kept, residual)
    ops.residual_norm(partials, kept, weight, 1e-6, whole)
    rows = index.long()
    if isinstance(some, Int8Rows) and isinstance(plain, Int8Rows) and isinstance(whole, Int8Rows):
        assert torch.equal(some.quants, whole.quants[rows])
        assert torch.equal(some.scales, whole.scales[rows])
        assert_close_rows(some, plain)
    elif isinstance(some, Tensor) and isinstance(plain, Tensor) and isinstance(whole, Tensor):
        assert torch.equal(some, whole[rows])
        torch.testing.assert_close(some, plain, rtol=1e-3, atol=1e-6)


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
        found8 = int8_rows(rows, n, rows_first=True)
        wanted8 = int8_rows(rows, n)
        ops.silu_multiply(gate, up, found8)
        reference_ops.silu_multiply(gate, up, wanted8)
        assert_close_rows(found8, wanted8)
    else:
        found, wanted = f16_rows(rows, n), f16_rows(rows, n)
        ops.silu_multiply(gate, up, found)
        reference_ops.silu_multiply(gate, up, wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_silu_of_pairs() -> None:
    """Gate and up in turn, eight columns of each: as two matrices that are one leave them."""
    gate, up = (torch.randn(1, 3, 1120) for _ in range(2))
    both = torch.stack([part.view(1, 3, -1, 8) for part in (gate, up)], dim=3).flatten(2)
    for implementation in (ops, reference_ops):
        found, wanted = f16_rows(3, 1120), f16_rows(3, 1120)
        implementation.silu_multiply(both, both, found, paired=8)
        implementation.silu_multiply(gate, up, wanted)
        assert torch.equal(found, wanted)


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


def test_f16_rows_of_what_no_kernel_writes() -> None:
    """More than a tile of columns, out of range and not."""
    x = torch.randn(3, 1056, generator=torch.Generator().manual_seed(1)) * 3e4
    found, wanted = f16_rows(3, 1056), f16_rows(3, 1056)
    ops.quantize_rows(x, found)
    reference_ops.quantize_rows(x, wanted)
    assert torch.equal(found, wanted)
    assert torch.equal(deinterleave(found, 1056), x.clamp(-65504, 65504).half())


def some_rows(head_dim: int) -> Rows:
    """AR rows at 5 and 6 of one sequence, two diffusion rows, an unused one; an AR row of another
    sequence, with two more places; random rotations."""
    rows = rows_of(
        6,
        head_dim=head_dim,
        views=[AR, AR, DIFFUSION, DIFFUSION, UNUSED, AR],
        positions=[5, 6, 7, 8, 0, 3],
        places=[5, 6, 0, 0, 0, 4],
        sequences=[1, 1, 1, 1, 0, 0],
        more_first=[0, 0, 0, 0, 0, 1],
        more_stop=[0, 0, 0, 0, 0, 3],
        more=[99, 7, 2],
    )
    angles = torch.rand(6, head_dim // 2, generator=torch.Generator().manual_seed(0)) * 6.28
    return dataclasses.replace(rows, cos=angles.cos(), sin=angles.sin())


def sentinel_planes(
    type_name: str, head_dim: int, capacity: int, layers: int | None = None
) -> KvPlanes:
    planes = new_planes(type_name, 2, capacity, head_dim, "cpu", layers)
    planes.values.fill_(77)
    planes.scales.fill_(77)
    return planes


def two_caches(type_name: str, head_dim: int) -> Caches:
    """Of two sequences of different sizes, three layers each, full of sentinels."""
    held = []
    for capacity in (8, 9):
        keys, values = (sentinel_planes(type_name, head_dim, capacity, 3) for _ in "kv")
        held.append((keys, values))
    entries = torch.tensor([cache_entry(*planes, ANCHOR) for planes in held])
    return Caches(type_name, type_name, 2, head_dim, ANCHOR, entries, held)


@pytest.mark.parametrize(
    ("norms", "biases", "adjacent"),
    [(True, False, False), (False, True, False), (False, False, True), (True, True, True)],
)
@pytest.mark.parametrize(
    ("type_name", "head_dim"),
    [("f16", 80), ("f16", 128), ("q8_0", 64), ("q8_0", 96), ("q4_0", 96), ("q4_0", 128)],
)
def test_finish_qkv(
    type_name: str, head_dim: int, norms: bool, biases: bool, adjacent: bool
) -> None:
    torch.manual_seed(head_dim)
    rows, n_head = some_rows(head_dim), 4
    partials = torch.randn(2, 6, (n_head + 4) * head_dim)
    weights = HeadWeights(
        torch.randn(2, 2, head_dim) if norms else None,
        torch.randn(2, (n_head + 4) * head_dim) if biases else None,
        adjacent,
        1e-6,
    )
    results = []
    for implementation in (finish_qkv, reference_attention.finish_qkv):
        q = torch.full((6, n_head, head_dim), NAN, dtype=torch.float16)
        caches = two_caches(type_name, head_dim)
        blocks = [sentinel_planes("f16", head_dim, 6) for _ in "kv"]
        implementation(partials, weights, rows, q, caches, 1, *blocks)
        results.append((q, [planes for pair in caches.held for planes in pair], blocks))
    (q, caches_found, blocks), (wanted_q, wanted_caches, wanted_blocks) = results
    torch.testing.assert_close(q, wanted_q, rtol=2e-3, atol=1e-3)
    pairs = zip(blocks + caches_found, wanted_blocks + wanted_caches, strict=True)
    for found, wanted in pairs:
        size = 2 / 127 if found.type_name == "q8_0" else 1 / 4
        tolerance = 2e-3 if found.type_name == "f16" else size
        a, b = dequantize_planes(found), dequantize_planes(wanted)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-3)
        assert (found.values != wanted.values).float().mean() < 3e-3
    for planes, written in zip(caches_found, ([2, 4, 7], [2, 4, 7], [5, 6], [5, 6]), strict=True):
        others = [i for i in range(planes.capacity) if i not in written]
        untouched = planes.values[1][:, others]
        assert torch.equal(untouched, torch.full_like(untouched, 77)), "only AR rows are cached"
        assert (planes.values[1][:, written] != 77).any(dim=-1).all()
        assert (planes.values[[0, 2]] == 77).all(), "other layers stay"
    first = caches_found[0].values[1]
    assert torch.equal(first[:, 7], first[:, 4]), "a row goes to all its places"
    assert torch.equal(first[:, 2], first[:, 4])


@pytest.mark.parametrize("type_name", ["f16", "q4_0"])
def test_gated_queries_and_partial_rope(type_name: str) -> None:
    """A gate lies behind each query; RoPE turns the first 32 of 128 elements."""
    torch.manual_seed(7)
    rows, n_head, head_dim = some_rows(32), 4, 128
    partials = torch.randn(2, 6, (2 * n_head + 4) * head_dim)
    weights = HeadWeights(torch.randn(2, 2, head_dim), None, False, 1e-6, gated=True)
    results = []
    for implementation in (finish_qkv, reference_attention.finish_qkv):
        q = torch.full((6, n_head, head_dim), NAN, dtype=torch.float16)
        caches = two_caches(type_name, head_dim)
        blocks = [sentinel_planes("f16", head_dim, 6) for _ in "kv"]
        implementation(partials, weights, rows, q, caches, 1, *blocks)
        results.append((q, [dequantize_planes(p) for pair in caches.held for p in pair]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-3, atol=1e-3)
    for found, wanted in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-3 if type_name == "f16" else 0.25,
                                   atol=1e-3)  # fmt: skip
    sums = partials.sum(0).view(6, -1, head_dim)
    last = sums[:, 2] / (sums[:, 2].pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    wanted = (last * weights.norms[0, 0])[rows.views == 0, 32:]  # type: ignore[index]
    torch.testing.assert_close(results[0][0][rows.views == 0, 1, 32:].float(), wanted, rtol=2e-3,
                               atol=2e-3)  # fmt: skip


@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_0"])
def test_moved_columns(type_name: str) -> None:
    """In all layers and heads of the sequences that are named, and nowhere else."""
    moves = torch.tensor([[1, 5, 0], [-1, 2, 3], [0, 7, 1], [1, 6, 2]], dtype=torch.int32)
    results = []
    for implementation in (move_columns, reference_attention.move_columns):
        caches = two_caches(type_name, 96)
        generator = torch.Generator().manual_seed(3)
        for planes in (planes for pair in caches.held for planes in pair):
            for plane in (planes.values, planes.scales) if type_name != "f16" else (planes.values,):
                numbers = torch.rand(plane.shape, generator=generator) * 200
                plane.copy_(numbers.to(plane.dtype))
        before = [planes.values.clone() for pair in caches.held for planes in pair]
        implementation(caches, moves, 3)
        after = [planes for pair in caches.held for planes in pair]
        for old, new in zip(before[2:], after[2:], strict=True):
            assert torch.equal(new.values[:, :, [0, 2]], old[:, :, [5, 6]])
            assert torch.equal(new.values[:, :, [1, 3, 4, 5, 6]], old[:, :, [1, 3, 4, 5, 6]])
        results.append([(planes.values, planes.scales) for planes in after])
    for (values, scales), (wanted, wanted_scales) in zip(*results, strict=True):
        assert torch.equal(values, wanted)
        assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
def test_cache_quantization_is_ggmls(type_name: str) -> None:
    """The stored numbers are, bit for bit, those of gguf's quantizer (and so of llama.cpp)."""
    rows, rng = some_rows(64), np.random.default_rng(0)
    v = rng.standard_normal((6, 2, 64)).astype(np.float32)
    v[0, 0, :32] = 0
    v[0, 1, 3:9] = [4, -4, 4, -4, 3.5, -4]  # a draw: the first one gives the sign
    v[1, 0, :32] *= 1e-6  # a scale in f16's subnormals
    v[1, 1, 32:64] = np.arange(32) - 15.5
    partials = torch.zeros(1, 6, 6 * 64)
    partials[0, :, -128:] = torch.from_numpy(v.reshape(6, 128))
    caches = two_caches(type_name, 64)
    blocks = [sentinel_planes("f16", 64, 6) for _ in "kv"]
    q = torch.empty(6, 2, 64, dtype=torch.float16)
    weights = HeadWeights(torch.ones(2, 2, 64), None, False, 1e-6)
    finish_qkv(partials, weights, rows, q, caches, 2, *blocks)

    kind = gguf.GGMLQuantizationType[type_name.upper()]
    raw = gguf.quants.quantize(v[:2].reshape(4, 64), kind)
    wanted = gguf.quants.dequantize(raw, kind).reshape(2, 2, 64)
    values = caches.held[1][1].layer(2)
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
    numbers, scale = rope_frequencies(rope, 128)
    frequencies = torch.from_numpy(numbers)
    angles = rope_angles(frequencies, position)
    for implementation in (rotary_angles, reference_ops.rotary_angles):
        rows = rows_of(1, head_dim=128, positions=[position])
        rows.cos.fill_(NAN)
        rows.sin.fill_(NAN)
        implementation(rows, frequencies, scale)
        for found, function in ((rows.cos, math.cos), (rows.sin, math.sin)):
            wanted = torch.tensor([function(a) * scale for a in angles], dtype=torch.float64)
            assert (found[0].double() - wanted).abs().max() < 1.2e-7 * scale


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
