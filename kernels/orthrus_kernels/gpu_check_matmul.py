"""The matrix products' part of gpu_check: right, the same bits for any rows, and how fast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from orthrus_kernels import reference
from orthrus_kernels.activation_rows import Int8Rows, new_int8_rows
from orthrus_kernels.activations import interleave
from orthrus_kernels.dispatch import (
    INT8_TYPES,
    Choice,
    Tile,
    choose,
    fit_tile,
    layout_for,
    load_table,
    safe_tile,
    split_for,
)
from orthrus_kernels.gpu_check import Check, Figure, Machine, median_time
from orthrus_kernels.matmul import Activations, head_argmax, matmul, sum_partials
from orthrus_kernels.ops import quantize_rows
from orthrus_kernels.packing import pack
from orthrus_kernels.quant_tensor import PLAIN_TYPES, TRAITS, Layout, QuantTensor, row_bytes

_T = GGMLQuantizationType

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)

LIMIT = {Layout.A16: 1e-5, Layout.A8: 5e-4}
"""NMSE against float64."""


@dataclass(frozen=True)
class Model:
    """The matrices that one pass reads: name -> (rows, k, times)."""

    name: str
    matrices: dict[str, tuple[int, int, int]]


def qwen3(name: str, layers: int, width: int, heads: int, hidden: int) -> Model:
    """A Qwen3 of head size 128 and 8 KV heads."""
    return Model(
        name,
        {
            "qkv": ((heads + 16) * 128, width, layers),
            "o": (width, heads * 128, layers),
            "gate+up": (2 * hidden, width, layers),
            "down": (width, hidden, layers),
            "head": (151936, width, 1),
        },
    )


MODELS = (
    qwen3("1.7B", 28, 2048, 16, 6144),
    qwen3("4B", 36, 2560, 32, 9728),
    qwen3("8B", 36, 4096, 32, 12288),
)

TIMED_TYPES = (_T.Q4_K, _T.Q5_K, _T.Q6_K, _T.Q8_0)

_SCALE_BYTES = {
    _T.Q4_K: (0, 2),
    _T.Q5_K: (0, 2),
    _T.Q6_K: (208,),
    _T.Q3_K: (108,),
    _T.Q2_K: (80, 82),
}


def random_rows(kind: GGMLQuantizationType, rows: int, k: int, device: str) -> Tensor:
    """Valid GGUF rows on the device: random bytes, fp16 scales between 1e-4 and 1e-3."""
    generator = torch.Generator(device=device).manual_seed(rows + k)
    if kind in PLAIN_TYPES:
        dtype = torch.float16 if kind == _T.F16 else torch.bfloat16
        numbers = torch.randn(rows, k, generator=generator, device=device) * 0.02
        return numbers.to(dtype).view(torch.uint8).reshape(rows, -1)
    shape = (rows, row_bytes(kind, k))
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    blocks = raw.view(rows, -1, GGML_QUANT_SIZES[kind][1])
    for start in _SCALE_BYTES.get(kind, (0,)):
        size = (rows, blocks.shape[1], 1)
        scale = torch.rand(size, generator=generator, device=device) * 9e-4 + 1e-4
        blocks[..., start : start + 2] = scale.half().view(torch.uint8)
    return raw


def activations(x: Tensor, layout: Layout) -> Activations:
    """f16 rows in natural order -> what weights of a layout take."""
    if layout is Layout.A16:
        return interleave(x)
    rows, k = x.shape
    flat = new_int8_rows(k // 32, rows * 32, x.device)  # groups outermost
    by_group = Int8Rows(
        flat.quants.transpose(0, 1), flat.scales.transpose(0, 1), flat.sums.transpose(0, 1)
    )
    quantize_rows(x, by_group)
    return by_group


def _numbers(rows: int, k: int, device: str) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(k)
    return torch.randn(rows, k, generator=generator, device=device).half()


def _cases() -> Iterator[tuple[GGMLQuantizationType, Layout]]:
    for kind in (*TRAITS, *PLAIN_TYPES):
        yield kind, Layout.A16
        if kind in INT8_TYPES:
            yield kind, Layout.A8


def _tile(machine: Machine, kind: GGMLQuantizationType, layout: Layout, rows: int, n: int) -> Tile:
    return fit_tile(safe_tile(layout, kind, rows, machine.capability), n)


def checks(machine: Machine) -> Iterator[Check]:
    """Right against float64, and the same bits however many rows share the launch."""
    n, k = (128, 512) if machine.tiny else (4096, 4096)
    kinds = [(_T.Q4_K, layout) for layout in Layout] if machine.tiny else list(_cases())
    for kind, layout in kinds:
        weight = pack(random_rows(kind, n, k, machine.device), kind, k, layout)
        yield from _correct(machine, weight)
        yield _invariant(machine, weight)
    yield _large_head(machine)


def _correct(machine: Machine, weight: QuantTensor) -> Iterator[Check]:
    rows = 5 if machine.tiny else 64
    x = _numbers(rows, weight.k, machine.device)
    given = activations(x, weight.layout)
    tile = _tile(machine, weight.type, weight.layout, rows, weight.rows)
    out = torch.full((2, rows, weight.rows), float("nan"), device=machine.device)
    found = sum_partials(matmul(given, weight, tile, split=2, out=out)).double()
    expected = x.double() @ reference.dequantize(weight).double().T
    error = float(((found - expected) ** 2).sum() / (expected**2).sum())
    name = f"{weight.type.name} {weight.layout.value} against float64"
    yield Check(name, error < LIMIT[weight.layout], f"NMSE {error:.1e}")
    best = head_argmax(given, weight, tile)
    logits = matmul(given, weight, tile)[0]
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    yield Check(
        f"{weight.type.name} {weight.layout.value} argmax", torch.equal(best.tokens, first.int())
    )


def _invariant(machine: Machine, weight: QuantTensor) -> Check:
    """Each row's bits, at any number of rows and any tile."""
    most = 5 if machine.tiny else 64
    x = _numbers(most, weight.k, machine.device)
    split = split_for(weight.rows, weight.k)
    layout, kind = weight.layout, weight.type

    def product(rows: int, tile_rows: int, n: int) -> Tensor:
        safe = _tile(machine, kind, layout, tile_rows, weight.rows)
        tile = safe if n == 0 else Tile(tile_rows, n, safe.warps, safe.stages)
        return matmul(activations(x[:rows], layout), weight, tile, split)

    whole = product(most, 32, 0)
    counts = (1, 3) if machine.tiny else (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 48, 63, 64)
    tiles = (16,) if machine.tiny else (16, 32, 64)
    differing = [
        f"{rows} rows in tiles of {tile_rows}"
        for rows, tile_rows in itertools.product(counts, tiles)
        if not torch.equal(product(rows, tile_rows, 0), whole[:, :rows])
    ]
    detail = "; ".join(differing[:4]) or f"{len(counts)} row counts, tiles of {tiles}"
    return Check(f"{kind.name} {layout.value} rows bit for bit", not differing, detail)


def _large_head(machine: Machine) -> Check:
    """A matrix of more than 2^31 numbers, zero but for its last panel: offsets need 64 bits."""
    n, k, rows = (192, 256, 2) if machine.tiny else (151936, 16384, 64)
    last = pack(random_rows(_T.F16, 64, k, machine.device), _T.F16, k)
    plane = last.planes["main"]
    whole = plane.new_zeros(n // 64, *plane.shape[1:])
    whole[-1:] = plane
    weight = QuantTensor(_T.F16, n, k, Layout.A16, {"main": whole})
    given = activations(_numbers(rows, k, machine.device), Layout.A16)
    logits = matmul(given, weight, _tile(machine, _T.F16, Layout.A16, rows, n))[0]
    expected = matmul(given, last, _tile(machine, _T.F16, Layout.A16, rows, 64))[0]
    passed = torch.equal(logits[:, -64:], expected) and not bool(logits[:, :-64].any())
    return Check(f"head of {n} x {k} F16", passed, "the last 64 logits, and zeros before them")


def figures(machine: Machine) -> Iterator[Figure]:
    """Time per matrix and per pass, for every model, type and number of rows."""
    models = MODELS[:1] if machine.tiny else MODELS
    for model, kind in itertools.product(models, TIMED_TYPES):
        layouts = {layout_for(kind, machine.capability), Layout.A16}
        if kind in INT8_TYPES:
            layouts.add(Layout.A8)
        for layout in sorted(layouts, key=lambda item: item.value):
            yield from _model_figures(machine, model, kind, layout)


def _model_figures(
    machine: Machine, model: Model, kind: GGMLQuantizationType, layout: Layout
) -> Iterator[Figure]:
    ceiling = machine.copy_bytes_per_second or 1.0
    total = dict.fromkeys(ROWS, 0.0)
    total_bytes = 0
    name = f"{model.name} {kind.name} {layout.value}"
    for matrix, (n, k, times) in model.matrices.items():
        weight = pack(random_rows(kind, n, k, machine.device), kind, k, layout)
        total_bytes += weight.nbytes * times
        for rows in ROWS:
            ms = _time(machine, weight, rows)
            total[rows] += ms * times
            speed = weight.nbytes / ms * 1e3
            if rows in (1, 32, 64):
                note = f"{speed / 1e9:.0f} GB/s, {speed / ceiling:.0%} of the copy ceiling"
                yield Figure(f"{name} {matrix} {n}x{k}, {rows} rows", ms, "ms", note)
    for rows in ROWS:
        share = total_bytes / total[rows] * 1e3 / ceiling
        note = f"{share:.0%} of the copy ceiling, {total[rows] / total[1]:.2f} of one row"
        yield Figure(f"{name} pass, {rows} rows", total[rows], "ms", note)
    yield Figure(f"{name} flatness t(32)/t(1)", total[32] / total[1], "x")
    yield Figure(f"{name} flatness t(64)/t(1)", total[64] / total[1], "x")


def _time(machine: Machine, weight: QuantTensor, rows: int) -> float:
    """Median milliseconds of one product with the tile that the runtime would use."""
    chosen: Choice = choose(
        rows,
        weight.type,
        weight.rows,
        weight.k,
        machine.capability,
        load_table(machine.name),
        weight.layout,
    )
    given = activations(_numbers(rows, weight.k, machine.device), weight.layout)
    out = torch.empty(chosen.split, rows, weight.rows, device=machine.device)
    return median_time(lambda: matmul(given, weight, chosen.tile, chosen.split, out=out))
