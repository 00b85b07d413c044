"""Times of packing, and what other tiles of the products give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from gguf import GGMLQuantizationType

from orthrus_kernels.packing.pack import pack
from orthrus_kernels.products.dispatch import fit_tile, layout_for, safe_tile
from orthrus_kernels.tools.gpu_check_matmul import random_rows
from orthrus_kernels.tools.gpu_check_report import Figure, Machine, median_time
from orthrus_kernels.tools.tuner import best_tile, candidates

_T = GGMLQuantizationType


def packing_figures(machine: Machine) -> Iterator[Figure]:
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
