"""The matrix products in the interpreter: against float64 products of `gguf`'s weights, and row by
row against themselves, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from gguf import GGMLQuantizationType as T
from long_cases import mostly_slow
from orthrus_kernels import plain as reference
from orthrus_kernels.elementwise.activation_rows import Int8Rows, new_int8_rows
from orthrus_kernels.elementwise.activations import deinterleave, interleave
from orthrus_kernels.elementwise.ops import quantize_rows
from orthrus_kernels.packing.pack import interleave_rows, pack
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, TRAITS, Layout, QuantTensor
from orthrus_kernels.products.dequantize import dequantize, prompt_matmul
from orthrus_kernels.products.dispatch import INT8_TYPES, Tile
from orthrus_kernels.products.matmul import Activations, gate_up, head_top2, matmul, sum_partials
from orthrus_kernels.sampling.sample import RESULT, pick
from quant_rows import dequantized, nmse, random_rows
from torch import Tensor

CASES = [
    *[(kind, Layout.A16) for kind in (*TRAITS, *PLAIN_TYPES)],
    *[(kind, Layout.A8) for kind in TRAITS if kind in INT8_TYPES],
]
#: Of every kind of scales and minima, one.
INT8_FIRST = (T.Q4_K, T.Q6_K, T.Q8_0, T.Q2_K)
LIMIT = {Layout.A16: 1e-5, Layout.A8: 5e-4}
HUGE, TINY = 4.0, 1e-7


def tile(rows: int, n: int = 64) -> Tile:
    return Tile(rows, n, 4, 3)


def numbers(rows: int, k: int, seed: int = 0) -> Tensor:
    """f16 [rows, k] in natural order."""
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).half()


def activations(x: Tensor, layout: Layout) -> Activations:
    if layout is Layout.A16:
        return interleave(x)
    rows = new_int8_rows(x.shape[0], x.shape[1], "cpu")
    quantize_rows(x, rows)
    return rows


def by_row(rows: Int8Rows) -> Int8Rows:
    """The same numbers with rows outermost in memory."""
    return Int8Rows(*(part.contiguous() for part in (rows.quants, rows.scales, rows.sums)))


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=lambda value: value.name)
def test_product_of_every_type(kind: T, layout: Layout) -> None:
    """17 rows in two row tiles, 70 columns in two panels, K in two uneven splits."""
    raw = random_rows(kind, 70, 768)
    x = numbers(17, 768)
    out = torch.full((2, 17, 70), math.nan)
    weight = pack(raw, kind, 768, layout)
    result = matmul(activations(x, layout), weight, tile(16), split=2, out=out)
    expected = x.double() @ dequantized(kind, raw).T
    assert nmse(sum_partials(result), expected) < LIMIT[layout]
    ours = reference.matmul(activations(x, layout), weight, tile(16), split=2)
    assert nmse(result, ours) < 1e-5


@pytest.mark.parametrize(("rows", "tile_rows"), [(1, 16), (5, 32), (31, 32), (33, 64), (64, 64)])
@pytest.mark.parametrize("layout", Layout)
def test_row_counts(rows: int, tile_rows: int, layout: Layout) -> None:
    raw = random_rows(T.Q4_K, 128, 512, seed=rows)
    x = numbers(rows, 512)
    weight = pack(raw, T.Q4_K, 512, layout)
    out = torch.full((1, rows, 128), math.nan)
    result = matmul(activations(x, layout), weight, tile(tile_rows, 128), out=out)
    assert nmse(result[0], x.double() @ dequantized(T.Q4_K, raw).T) < LIMIT[layout]


@pytest.mark.parametrize("kind", [T.Q8_0, T.Q5_0, T.F16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("layout", Layout)
def test_k_tail(kind: T, layout: Layout) -> None:
    """K = 288: the last step holds 32 weights; what follows a row of x must not be read."""
    if kind in PLAIN_TYPES and layout is Layout.A8:
        pytest.skip("plain types take fp16 rows")
    raw = random_rows(kind, 64, 288)
    x = numbers(3, 288)
    given = activations(x, layout)
    if isinstance(given, Int8Rows):  # rows and groups beyond the end are poison
        wide = new_int8_rows(5, 288 + 256, "cpu")
        wide.quants.fill_(127)
        wide.scales.fill_(math.nan)
        wide.sums.fill_(math.nan)
        view = Int8Rows(wide.quants[:3, :9], wide.scales[:3, :9], wide.sums[:3, :9])
        quantize_rows(x, view)
        given = view
    result = matmul(given, pack(raw, kind, 288, layout), tile(16))
    assert nmse(result[0], x.double() @ dequantized(kind, raw).T) < LIMIT[layout]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [case for case in CASES if case[0] in (T.Q4_K, T.Q6_K, T.Q8_0, T.Q3_K)],
    ids=lambda value: value.name,
)
def test_extreme_scales(kind: T, layout: Layout) -> None:
    """Qblocks with zero, huge, tiny (subnormal) and negative scales side by side."""
    raw = random_rows(kind, 64, 512, scales=(0.0, HUGE, TINY, -HUGE, -TINY, 1e-3))
    x = numbers(2, 512)
    expected = x.double() @ dequantized(kind, raw).T
    result = matmul(activations(x, layout), pack(raw, kind, 512, layout), tile(16))[0]
    assert bool(torch.isfinite(result).all())
    assert nmse(result, expected) < LIMIT[layout]
    small = random_rows(kind, 64, 512, scales=(0.0, TINY, -TINY))
    expected = x.double() @ dequantized(kind, small).T
    result = matmul(activations(x, layout), pack(small, kind, 512, layout), tile(16))[0]
    assert nmse(result, expected) < LIMIT[layout]


@pytest.mark.parametrize(
    "kind", mostly_slow(INT8_FIRST, sorted(INT8_TYPES - {*INT8_FIRST})), ids=lambda kind: kind.name
)
def test_int8_rows_do_not_see_each_other(kind: T) -> None:
    """33 rows at once equal single rows bit for bit, whatever the tile and the strides."""
    weight = pack(random_rows(kind, 128, 512), kind, 512, Layout.A8)
    x = numbers(33, 512)
    together = matmul(activations(x, Layout.A8), weight, tile(32, 128), split=2)
    for row in (0, 31, 32):
        given = activations(x[row : row + 1], Layout.A8)
        assert isinstance(given, Int8Rows)
        alone = matmul(by_row(given), weight, tile(16, 64), split=2)
        assert torch.equal(alone[:, 0], together[:, row])


@pytest.mark.parametrize("layout", Layout)
def test_two_matrices_in_one_launch(layout: Layout) -> None:
    """Q and K of one type and V of another: the columns of both, with an odd seam."""
    first, second = random_rows(T.Q4_K, 100, 512), random_rows(T.Q6_K, 70, 512, seed=1)
    x = activations(numbers(5, 512), layout)
    a, b = pack(first, T.Q4_K, 512, layout), pack(second, T.Q6_K, 512, layout)
    out = torch.full((2, 5, 170), math.nan)
    both = matmul(x, a, tile(16), split=2, second=b, out=out)
    assert torch.equal(both[..., :100], matmul(x, a, tile(16), split=2))
    assert torch.equal(both[..., 100:], matmul(x, b, tile(16), split=2))


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("to_int8", [False, True])
def test_gate_up(layout: Layout, to_int8: bool) -> None:
    gate, up = random_rows(T.Q4_K, 96, 512, seed=1), random_rows(T.Q4_K, 96, 512, seed=2)
    x = numbers(17, 512) * 4
    weight = pack(interleave_rows(gate, up), T.Q4_K, 512, layout)
    given = activations(x, layout)
    g, u = (x.double() @ dequantized(T.Q4_K, raw).T for raw in (gate, up))
    expected = torch.nn.functional.silu(g) * u
    out = new_int8_rows(17, 96, "cpu") if to_int8 else None
    found = gate_up(given, weight, tile(32), out=out)
    if isinstance(found, Int8Rows):
        values = (found.quants.double() * found.scales.double()[..., None]).flatten(1)
        assert nmse(values, expected) < LIMIT[Layout.A8]
        sums = found.quants.double().sum(-1) * found.scales.double()
        assert nmse(found.sums, sums) < 1e-12
    else:
        assert nmse(deinterleave(found, 96), expected) < LIMIT[layout]
        assert not bool(deinterleave(found, 256)[:, 96:].any())
        ours = reference.gate_up(given, weight, tile(32))
        assert not isinstance(ours, Int8Rows)
        assert nmse(found, ours) < 1e-5


def test_gate_up_stays_within_fp16() -> None:
    """Products beyond 65504 saturate: infinity would turn the next product into NaN."""
    big = torch.full((8, 256), 300.0).half().view(torch.uint8)
    x = interleave(torch.ones(1, 256).half())
    found = gate_up(x, pack(interleave_rows(big, big), T.F16, 256), tile(16))
    assert isinstance(found, Tensor)
    assert deinterleave(found, 8).tolist() == [[65504.0] * 8]


@pytest.mark.parametrize("layout", Layout)
def test_head_takes_the_lowest_of_equal_tokens(layout: Layout) -> None:
    """Rows 3, 40 and 140 of the matrix are the same: whichever is largest, the first must win."""
    raw = random_rows(T.Q6_K, 150, 512)
    raw[40] = raw[3]
    raw[140] = raw[3]
    weights = dequantized(T.Q6_K, raw)
    x = numbers(4, 512)
    x[1] = (weights[3] / weights[3].abs().max()).half()
    weight = pack(raw, T.Q6_K, 512, layout)
    tokens, values = best_of_all(activations(x, layout), weight)
    logits = matmul(activations(x, layout), weight, tile(16))[0]
    assert tokens[1] == 3
    assert torch.equal(values, logits.amax(1))
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(tokens, first.int())
    expected = (activations_as_f64(activations(x, layout), 512) @ weights.T).argmax(1)
    assert torch.equal(tokens.long(), expected)


def best_of_all(x: Activations, weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """Tokens and values of the largest logits. They, the runner-up and the probabilities are what
    the logits say, and what the reference finds."""
    found = head_top2(x, weight, tile(16))
    plain = reference.head_top2(x, weight, tile(16))
    out, wanted = torch.full((2, found.values.shape[2], RESULT), -7, dtype=torch.int32)
    pick(found.values, found.tokens, out)
    reference.pick(plain.values, plain.tokens, wanted)
    assert torch.equal(out[:, :2], wanted[:, :2])
    assert out[:, 4:].tolist() == wanted[:, 4:].tolist() == [[-7]] * len(out)
    logits = matmul(x, weight, tile(16))[0]
    both = logits.double().softmax(1).sort(1, descending=True).values[:, :2]
    for result, rtol in ((out, 1e-5), (wanted, 0.02)):  # the reference's logits are not rounded
        found_both = result[:, 2:4].view(torch.float32)
        torch.testing.assert_close(found_both, both.float(), rtol=rtol, atol=0)
    return out[:, 0], found.values[0].amax(0)


def activations_as_f64(x: Activations, k: int) -> Tensor:
    if isinstance(x, Int8Rows):
        return (x.quants.double() * x.scales.double()[..., None]).flatten(1)
    return deinterleave(x, k).double()


def test_head_ignores_the_padding_rows() -> None:
    """All logits negative: the zero rows that fill the last panel must not win."""
    raw = torch.full((3, 256), -1.0).half().view(torch.uint8)
    tokens, values = best_of_all(interleave(torch.ones(1, 256).half()), pack(raw, T.F16, 256))
    assert tokens.tolist() == [0]
    assert values.tolist() == [-256.0]


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=lambda value: value.name)
def test_dequantize(kind: T, layout: Layout) -> None:
    raw = random_rows(kind, 70, 512)
    weight = pack(raw, kind, 512, layout)
    out = torch.full((70, 512), math.nan, dtype=torch.float16)
    found = dequantize(weight, out)
    natural = deinterleave(found, 512) if layout is Layout.A16 else found
    assert nmse(natural, dequantized(kind, raw)) < 1e-6


def test_prompt_product() -> None:
    raw = random_rows(T.Q4_K, 70, 512)
    x = numbers(80, 512)
    room = torch.empty(80, 100)  # a part of wider rows
    found = room[:, 10:80]
    scratch = torch.empty(70 * 600).half()
    prompt_matmul(interleave(x), pack(raw, T.Q4_K, 512), scratch, found)
    assert nmse(found, x.double() @ dequantized(T.Q4_K, raw).T) < 1e-5


def test_refusals() -> None:
    a16 = pack(random_rows(T.Q4_K, 64, 512), T.Q4_K, 512)
    a8 = pack(random_rows(T.Q4_K, 64, 512), T.Q4_K, 512, Layout.A8)
    x = interleave(numbers(2, 512))
    with pytest.raises(ValueError, match="packed for a8 activations, found fp16"):
        matmul(x, a8, tile(16))
    with pytest.raises(ValueError, match="packed for a16 activations, found int8"):
        matmul(activations(numbers(2, 512), Layout.A8), a16, tile(16))
    with pytest.raises(ValueError, match="interleaved f16 rows of 512"):
        matmul(x[:, :256], a16, tile(16))
    with pytest.raises(ValueError, match="tile of 128 does not divide 64"):
        matmul(x, a16, tile(16, 128))
    with pytest.raises(ValueError, match="differ in k"):
        matmul(x, a16, tile(16), second=pack(random_rows(T.Q4_K, 64, 256), T.Q4_K, 256))
    with pytest.raises(ValueError, match="out is"):
        matmul(x, a16, tile(16), out=torch.empty(1, 2, 63))
