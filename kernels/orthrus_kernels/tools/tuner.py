"""Time the candidate tiles of every product of a model on this GPU, and keep the fastest.

    python -m orthrus_kernels.tools.tuner [--model 8B] [--folder DIR]

Writes <device>.json beside the tables of the package (or into DIR). Only what leaves the bits alone
is tuned: rows of W per tile, warps, stages. Split-K and the row tile follow from the shape.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from orthrus_kernels.packing.pack import pack
from orthrus_kernels.packing.quant_tensor import QuantTensor
from orthrus_kernels.products.dispatch import (
    Tile,
    fit_tile,
    layout_for,
    load_table,
    safe_tile,
    save_table,
    split_for,
    tile_key,
)
from orthrus_kernels.products.matmul import matmul
from orthrus_kernels.tools.gpu_check_matmul import activations, random_rows
from orthrus_kernels.tools.gpu_check_report import Machine, find_machine, median_time
from orthrus_kernels.tools.shapes import MODELS, TIMED_TYPES

GAIN = 0.98
"""A candidate replaces the safe tile only if it takes less than this part of its time."""


def candidates(rows: int) -> Iterator[Tile]:
    """Tiles worth timing. Warps work on 16 rows of W each (64 per four on sm_90)."""
    for n, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
        for stages in (2, 3, 4, 5):
            yield Tile(rows, n, warps, stages)


def best_tile(
    weight: QuantTensor, rows: int, safe: Tile, tries: Sequence[Tile] | None = None
) -> tuple[Tile, float, float]:
    """The fastest tile that gives the same bits as the safe one; its time and the safe one's."""
    generator = torch.Generator(device=weight.device).manual_seed(rows)
    x = torch.randn(rows, weight.k, generator=generator, device=weight.device).half()
    given = activations(x, weight.layout)
    split = split_for(weight.rows, weight.k)
    out = torch.empty(split, rows, weight.rows, device=weight.device)
    expected = matmul(given, weight, safe, split).clone()
    safe_time = median_time(lambda: matmul(given, weight, safe, split, out=out))
    best, best_time = safe, safe_time
    for tile in candidates(safe.rows) if tries is None else tries:
        if fit_tile(tile, weight.rows) != tile or tile == safe:
            continue
        try:
            found = matmul(given, weight, tile, split)
        except Exception as error:  # triton raises its own classes for tiles that do not fit
            print(f"  {tile}: {type(error).__name__}", file=sys.stderr)
            continue
        if not torch.equal(found, expected):
            raise RuntimeError(f"{tile} changes the bits of {weight.type.name}: a kernel is wrong")
        time = median_time(lambda tile=tile: matmul(given, weight, tile, split, out=out))
        if time < best_time and time < GAIN * safe_time:
            best, best_time = tile, time
    return best, best_time, safe_time


def tune(machine: Machine, models: Sequence[str]) -> dict[str, Tile]:
    """Tiles for all products of some models, by `dispatch.tile_key`."""
    tiles: dict[str, Tile] = {}
    shapes = {
        (n, k) for model in MODELS if model.name in models for n, k, _ in model.matrices.values()
    }
    kinds: tuple[GGMLQuantizationType, ...] = TIMED_TYPES
    for (n, k), kind in itertools.product(sorted(shapes), kinds):
        layout = layout_for(kind, machine.capability)
        weight = pack(random_rows(kind, n, k, machine.device), kind, k, layout)
        for rows in (16, 32, 64):
            safe = fit_tile(safe_tile(layout, kind, rows, machine.capability), n)
            tile, time, before = best_tile(weight, rows, safe)
            key = tile_key(layout, kind, n, k, rows)
            print(f"{key}: {tile} {time:.4f} ms (safe {before:.4f} ms)", flush=True)
            if tile != safe:
                tiles[key] = tile
    return tiles


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, merge with what is known of this device, write."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_kernels.tools.tuner")
    names = [model.name for model in MODELS]
    parser.add_argument("--model", action="append", choices=names, help="default: all")
    parser.add_argument("--folder", type=Path, help="default: the package's tuned/")
    options = parser.parse_args(arguments)
    machine = find_machine(cpu=False, quick=False)
    tiles = dict(load_table(machine.name, options.folder))
    tiles.update(tune(machine, options.model or names))
    print(save_table(machine.name, tiles, options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
