"""Times of the matrix products for gpu_check: per matrix, per pass, and what other tiles give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from gguf import GGMLQuantizationType

from orthrus_kernels.packing.pack import pack
from orthrus_kernels.packing.quant_tensor import Layout, QuantTensor
from orthrus_kernels.products.dispatch import (
    INT8_TYPES,
    choose,
    fit_tile,
    layout_for,
    load_table,
    safe_tile,
)
from orthrus_kernels.products.matmul import matmul
from orthrus_kernels.tools.gpu_check_matmul import activations, numbers, random_rows
from orthrus_kernels.tools.gpu_check_report import Figure, Machine, median_time
from orthrus_kernels.tools.shapes import MODELS, TIMED_TYPES, Model
from orthrus_kernels.tools.tuner import best_tile, candidates

_T = GGMLQuantizationType

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


PREDICTED = {
    (86, Layout.A16): "; predicted 6.8-7.5 ms on an RTX 3090",
    (86, Layout.A8): "; predicted 5.0-6.5 ms on an RTX 3090",
    (90, Layout.A16): "; predicted 1.0-1.4 ms on an H200",
}
"""A pass of 32 rows over 8B at Q4_K, by the model of kernels/LOG.md."""

_TINY = Model("tiny", {"qkv": (128, 512, 1), "head": (192, 512, 1)})


def figures(machine: Machine) -> Iterator[Figure]:
    """Time per matrix and per pass, for every model, type and number of rows; 8B first."""
    models = (_TINY,) if machine.tiny else tuple(reversed(MODELS))
    yield from _packing_figures(machine)
    for model, kind in itertools.product(models, TIMED_TYPES[:1] if machine.tiny else TIMED_TYPES):
        layouts = [layout_for(kind, machine.capability)]
        if model in (models[0], _TINY) and kind in INT8_TYPES:
            # What the other kind of activations would cost, once.
            layouts += [layout for layout in Layout if layout not in layouts]
        for layout in layouts:
            yield from _model_figures(machine, model, kind, layout)


def _packing_figures(machine: Machine) -> Iterator[Figure]:
    """Bytes of a file packed per second: in the device's memory, and from the host's."""
    n, k = (128, 512) if machine.tiny else (24576, 4096)
    for kind in (_T.Q4_K, _T.Q6_K):
        raw = random_rows(kind, n, k, machine.device)
        host = raw.cpu()
        for place, source in (("device", raw), ("host", host)):
            layout = layout_for(kind, machine.capability)
            ms = median_time(lambda s=source: pack(s, kind, k, layout, device=machine.device))  # noqa: B023
            speed = raw.numel() / ms / 1e6
            yield Figure(f"packing {kind.name} from the {place}", speed, "GB/s")


def _model_figures(
    machine: Machine, model: Model, kind: GGMLQuantizationType, layout: Layout
) -> Iterator[Figure]:
    row_counts = (1, 3) if machine.tiny else ROWS
    total = dict.fromkeys(row_counts, 0.0)
    total_bytes = 0
    name = f"{model.name} {kind.name} {layout.value}"
    for matrix, (n, k, times) in model.matrices.items():
        weight = pack(random_rows(kind, n, k, machine.device), kind, k, layout)
        total_bytes += weight.nbytes * times
        for rows in row_counts:
            ms = _time(machine, weight, rows)
            total[rows] += ms * times
            note = _share(machine, weight.nbytes / ms * 1e3)
            yield Figure(f"{name} {matrix} {n}x{k}, {rows} rows", ms, "ms", note)
    for rows in row_counts:
        note = _share(machine, total_bytes / total[rows] * 1e3)
        note += f", {total[rows] / total[1]:.2f} of one row"
        if (model.name, kind, rows) == ("8B", _T.Q4_K, 32):
            note += PREDICTED.get((machine.capability, layout), "")
        yield Figure(f"{name} pass, {rows} rows", total[rows], "ms", note)
    for rows in (32, 64) if not machine.tiny else ():
        yield Figure(f"{name} flatness t({rows})/t(1)", total[rows] / total[1], "x")


def _share(machine: Machine, speed: float) -> str:
    """Bytes per second as GB/s, and as part of the copy ceiling if that is known."""
    ceiling = machine.copy_bytes_per_second
    share = f", {speed / ceiling:.0%} of the copy ceiling" if ceiling else ""
    return f"{speed / 1e9:.0f} GB/s{share}"


def _time(machine: Machine, weight: QuantTensor, rows: int) -> float:
    """Median milliseconds of one product with the tile that the runtime would use."""
    chosen = choose(
        rows,
        weight.type,
        weight.rows,
        weight.k,
        machine.capability,
        load_table(machine.name),
        weight.layout,
    )
    given = activations(numbers(rows, weight.k, machine.device), weight.layout)
    out = torch.empty(chosen.split, rows, weight.rows, device=machine.device)
    return median_time(lambda: matmul(given, weight, chosen.tile, chosen.split, out=out))


def tuner_figures(machine: Machine) -> Iterator[Figure]:
    """What the tuner finds for the largest matrices of 8B: the best tile at 1 and at 32 rows."""
    shapes = ((128, 512),) if machine.tiny else ((24576, 4096), (4096, 12288))
    for (n, k), rows in itertools.product(shapes, (1, 32)):
        layout = layout_for(_T.Q4_K, machine.capability)
        weight = pack(random_rows(_T.Q4_K, n, k, machine.device), _T.Q4_K, k, layout)
        safe = fit_tile(safe_tile(layout, _T.Q4_K, rows, machine.capability), n)
        tries = [tile for tile in candidates(safe.rows) if tile.stages in (2, 3)]
        tile, time, before = best_tile(weight, rows, safe, tries[:1] if machine.tiny else tries)
        note = f"{tile.n} rows, {tile.warps} warps, {tile.stages} stages; safe tile {before:.4f} ms"
        yield Figure(f"tuned Q4_K {layout.value} {n}x{k}, {rows} rows", time, "ms", note)
