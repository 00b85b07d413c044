"""Checks of the matrix products on a GPU: right, and the same bits for any rows."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from orthrus_kernels import plain as reference
from orthrus_kernels.elementwise.activation_rows import new_int8_rows
from orthrus_kernels.elementwise.activations import deinterleave, interleave
from orthrus_kernels.elementwise.ops import quantize_rows
from orthrus_kernels.packing.pack import interleave_rows, pack
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, TRAITS, Layout, QuantTensor, row_bytes
from orthrus_kernels.products.dequantize import dequantize
from orthrus_kernels.products.dispatch import Tile, Use, fit_tile, layout_for, safe_tile, split_for
from orthrus_kernels.products.matmul import Activations, gate_up, head_top2, matmul, sum_partials
from orthrus_kernels.sampling.sample import RESULT, pick
from orthrus_kernels.tools.gpu_check_report import Check, Machine

_T = GGMLQuantizationType

LIMIT = {Layout.A16: 1e-5, Layout.A8: 5e-4}
"""NMSE against float64."""


MAIN_TYPES = (_T.Q4_K, _T.Q6_K, _T.Q5_K, _T.Q8_0)
"""Checked first, and tuned."""

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
    rows = new_int8_rows(x.shape[0], x.shape[1], x.device)
    quantize_rows(x, rows)
    return rows


def numbers(rows: int, k: int, device: str) -> Tensor:
    """f16 [rows, k] in natural order."""
    generator = torch.Generator(device=device).manual_seed(k)
    return torch.randn(rows, k, generator=generator, device=device).half()


Case = tuple[Machine, GGMLQuantizationType, Layout]


def smoke_checks(machine: Machine) -> Iterator[Check]:
    """The two types of a Q4_K_M file, in the layout that the runtime takes here."""
    kinds = (_T.Q4_K, _T.Q6_K)
    yield from _checked(
        machine, [(machine, kind, layout_for(kind, machine.capability)) for kind in kinds]
    )


def other_checks(machine: Machine) -> Iterator[Check]:
    """Large heads, then every other type in the layout that the runtime takes, the usual first."""
    yield _large_head(machine)
    kinds = [*MAIN_TYPES, *TRAITS, *PLAIN_TYPES]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind not in (_T.Q4_K, _T.Q6_K)]
    if machine.tiny:
        kinds = [_T.Q2_K]
    cases = [(machine, kind, layout_for(kind, machine.capability)) for kind in kinds]
    yield from _checked(machine, cases)


def _checked(machine: Machine, cases: list[Case]) -> Iterator[Check]:
    """`case_checks` of every case, in several processes: most of the time goes into compiling."""
    if machine.device == "cpu" or machine.tiny:
        for case in cases:
            yield from case_checks(case)
        return
    workers = max(1, min(8, len(cases), (os.cpu_count() or 2) // 2))
    # Leaving the block ends the processes, also when the caller's time is up.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for checks in pool.imap_unordered(case_checks, cases):
            yield from checks


def case_checks(case: Case) -> list[Check]:
    """All checks of one type and layout; an exception is a failed check."""
    machine, kind, layout = case
    name = f"{kind.name} {layout.value}"
    found: list[Check] = []
    try:
        n, k = (128, 512) if machine.tiny else (2048, 4096)
        raw = random_rows(kind, n, k, machine.device)
        weight = pack(raw, kind, k, layout)
        host = pack(raw.cpu(), kind, k, layout)
        same = all(torch.equal(weight.planes[p].cpu(), host.planes[p]) for p in host.planes)
        found.append(Check(f"{name} packed on the device as on the host", same))
        found += _correct(machine, weight, raw)
        found.append(_invariant(machine, weight))
    except Exception as error:
        found.append(Check(name, False, f"{type(error).__name__}: {str(error)[:300]}"))
    return found


def _tile(
    machine: Machine, weight: QuantTensor, rows: int, use: Use = Use.MATMUL, wide: bool = False
) -> Tile:
    """The tile of the runtime, or the same with twice the rows of W and twice the warps."""
    tile = safe_tile(weight.layout, weight.type, rows, machine.capability, use)
    if wide:
        tile = Tile(tile.rows, 2 * tile.n, min(8, 2 * tile.warps), tile.stages)
    return fit_tile(tile, weight.rows)


def _nmse(found: Tensor, expected: Tensor) -> float:
    return float(((found.double() - expected) ** 2).sum() / (expected**2).sum())


def _correct(machine: Machine, weight: QuantTensor, raw: Tensor) -> Iterator[Check]:
    rows = 5 if machine.tiny else 64
    name, limit = f"{weight.type.name} {weight.layout.value}", LIMIT[weight.layout]
    x = numbers(rows, weight.k, machine.device)
    given = activations(x, weight.layout)
    tile = _tile(machine, weight, rows)
    weights = reference.dequantize(weight).double()
    expected = x.double() @ weights.T
    out = torch.full((2, rows, weight.rows), float("nan"), device=machine.device)
    error = _nmse(sum_partials(matmul(given, weight, tile, split=2, out=out)), expected)
    yield Check(f"{name} against float64", error < limit, f"NMSE {error:.1e}")
    both = matmul(given, weight, tile, second=weight)[0]
    error = _nmse(both, torch.cat([expected, expected], 1))
    yield Check(f"{name} two matrices in a launch", error < limit, f"NMSE {error:.1e}")
    best = head_top2(given, weight, _tile(machine, weight, rows, Use.HEAD))
    logits = matmul(given, weight, tile)[0]
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    found = torch.empty(rows, RESULT, dtype=torch.int32, device=machine.device)
    pick(best.values, best.tokens, found)
    yield Check(f"{name} argmax", torch.equal(found[:, 0], first.int()))
    dense = dequantize(weight)
    if weight.layout is Layout.A16 or weight.type in PLAIN_TYPES:
        dense = deinterleave(dense, weight.k)
    error = _nmse(dense, weights)
    yield Check(f"{name} dequantized", error < 1e-6, f"NMSE {error:.1e}")
    half = weight.rows // 2
    pair = pack(interleave_rows(raw[:half], raw[half:]), weight.type, weight.k, weight.layout)
    target = new_int8_rows(rows, half, machine.device) if weight.layout is Layout.A8 else None
    gated = gate_up(given, pair, _tile(machine, pair, rows, Use.GATE_UP), out=target)
    wanted = torch.nn.functional.silu(expected[:, :half]) * expected[:, half:]
    error = _nmse(reference.natural_rows(gated, half), wanted)
    yield Check(f"{name} gate and up", error < LIMIT[Layout.A8], f"NMSE {error:.1e}")


def _invariant(machine: Machine, weight: QuantTensor) -> Check:
    """Each row's bits, at any number of rows and any tile."""
    most = 5 if machine.tiny else 64
    x = numbers(most, weight.k, machine.device)
    split = split_for(weight.rows, weight.k)

    def product(rows: int, tile_rows: int, wide: bool) -> Tensor:
        tile = _tile(machine, weight, tile_rows, wide=wide)
        return matmul(activations(x[:rows], weight.layout), weight, tile, split)

    whole = product(most, 32, False)
    counts = (1, 3) if machine.tiny else (1, 2, 3, 4, 5, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)
    tiles = (16,) if machine.tiny else (16, 32, 64)
    shapes = [(tile_rows, False) for tile_rows in tiles]
    if weight.type in MAIN_TYPES and not machine.tiny:
        shapes.append((32, True))
    differing = []
    for rows, (tile_rows, wide) in itertools.product(counts, shapes):
        found = product(rows, tile_rows, wide)
        if not torch.equal(found, whole[:, :rows]):
            most_off = float((found - whole[:, :rows]).abs().max())
            differing.append(
                f"{rows} rows in tiles of {tile_rows}{' (wide)' if wide else ''} by {most_off:.1e}"
            )
    detail = "; ".join(differing[:4]) or f"{len(counts)} row counts, tiles of {tiles}"
    name = f"{weight.type.name} {weight.layout.value} rows bit for bit"
    return Check(name, not differing, detail)


def _large_head(machine: Machine) -> Check:
    """A matrix of more than 2^31 numbers, zero but for its last panel: offsets need 64 bits."""
    n, k, rows = (192, 256, 2) if machine.tiny else (151936, 16384, 64)
    last = pack(random_rows(_T.F16, 64, k, machine.device), _T.F16, k)
    plane = last.planes["main"]
    whole = plane.new_zeros(n // 64, *plane.shape[1:])
    whole[-1:] = plane
    weight = QuantTensor(_T.F16, n, k, Layout.A16, {"main": whole})
    given = activations(numbers(rows, k, machine.device), Layout.A16)
    logits = matmul(given, weight, _tile(machine, weight, rows))[0]
    expected = matmul(given, last, _tile(machine, last, rows))[0]
    passed = torch.equal(logits[:, -64:], expected) and not bool(logits[:, :-64].any())
    return Check(f"head of {n} x {k} F16", passed, "the last 64 logits, and zeros before them")
