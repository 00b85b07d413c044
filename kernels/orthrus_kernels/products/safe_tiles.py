"""Find, offline, a tile for every type, row tile and architecture that compiles without spills.

    python -m orthrus_kernels.products.safe_tiles [--capability 86] [--type Q4_K]

ptxas trades a few registers for spills in ways that no formula predicts, so the candidates are
compiled in order and the first clean one is kept, in tuned/offline.json. A use of the product
(gate+up, head, a second matrix) that is not clean at the product's tile gets an entry of its own.
Takes up to an hour; needed only when a kernel changes so that a test finds a spill.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from gguf import GGMLQuantizationType

from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, TRAITS, Layout
from orthrus_kernels.products.cases import PAIRS, ROWS, VARIANTS, product_cases
from orthrus_kernels.products.dispatch import Tile, first_tile, tuned_directory
from orthrus_kernels.products.matrix import layouts, variants
from orthrus_kernels.tools.offline import (
    CAPABILITIES,
    SHARED_MEMORY_LIMIT,
    Resources,
    compile_case,
)

Product = tuple[str, GGMLQuantizationType | None]
"""One of VARIANTS, and the type of a second matrix."""


def candidates(rows: int, capability: int) -> Iterator[Tile]:
    """Tiles to try, best first."""
    first = first_tile(rows, capability)
    for n, warps in ((first.n, first.warps), (64, 4), (128, 4), (128, 8)):
        for stages in (first.stages, 3, 2, 4):
            yield Tile(first.rows, n, warps, stages)


def clean(used: Resources, capability: int) -> bool:
    """No stack, no spills, fits, and no warp works on another's part of K."""
    limit = SHARED_MEMORY_LIMIT[capability] * 1024
    whole = all(layout == (used.num_warps, 1) for layout in used.warps_per_cta)
    return used.stack == 0 and used.spills == 0 and used.shared <= limit and whole


def works(
    product: Product, kind: GGMLQuantizationType, layout: Layout, tile: Tile, capability: int
) -> bool:
    """Whether one kernel is clean at a tile."""
    variant, second = product
    tiles: dict[Tile, tuple[int, ...]] = {tile: (capability,)}
    (case,) = product_cases(variant, kind, layout, tile.rows, second=second, tiles=tiles)
    return clean(compile_case(case, capability).report(), capability)


def find_tiles(
    kind: GGMLQuantizationType, layout: Layout, rows: int, capability: int
) -> dict[str, Tile | None]:
    """Keys of `dispatch.safe_tile` -> the first clean candidate, or None where there is none."""
    tries = list(dict.fromkeys(candidates(rows, capability)))
    uses: dict[str, list[Product]] = {}
    for variant in variants(capability):
        uses.setdefault(VARIANTS[variant].value, []).append((variant, None))
    for first, second in PAIRS:
        if first == kind:
            uses[second.name] = [("matmul", second)]
    key = f"{layout.value}/{kind.name}/{rows}"
    found: dict[str, Tile | None] = {}
    for use, products in uses.items():
        usual = found.get(key)
        order = tries if usual is None else list(dict.fromkeys((usual, *tries)))
        tile = next(
            (t for t in order if all(works(p, kind, layout, t, capability) for p in products)),
            None,
        )
        if use == "matmul":
            found[key] = tile
        elif tile is None or tile != usual:
            found[f"{key}/{use}"] = tile
    return found


def search(capability: int, kinds: Sequence[GGMLQuantizationType]) -> bool:
    """Find the tiles of some types on one architecture and keep them; False if some has none."""
    path = tuned_directory() / "offline.json"
    found: dict[str, Tile | None] = {}
    for kind in kinds:
        for layout in layouts(kind, capability):
            for rows in ROWS:
                here = find_tiles(kind, layout, rows, capability)
                found.update(here)
                for key, tile in here.items():
                    print(f"sm_{capability} {key}: {tile}", flush=True)
    table = json.loads(path.read_text()) if path.exists() else {}
    names = {kind.name for kind in kinds}
    kept = {
        key: tile
        for key, tile in table.get(str(capability), {}).items()
        if key.split("/")[1] not in names
    }
    tiles = {key: [t.rows, t.n, t.warps, t.stages] for key, t in found.items() if t is not None}
    table[str(capability)] = {**kept, **tiles}
    lines = []
    for known, entries in sorted(table.items(), key=lambda item: int(item[0])):
        inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        lines.append(f" {json.dumps(known)}: {{\n{inner}\n }}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return None not in found.values()


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, print, and update tuned/offline.json."""
    every = (*TRAITS, *PLAIN_TYPES)
    parser = argparse.ArgumentParser(prog="python -m orthrus_kernels.products.safe_tiles")
    parser.add_argument("--capability", type=int, action="append")
    parser.add_argument("--type", action="append", choices=[kind.name for kind in every])
    options = parser.parse_args(arguments)
    kinds = [kind for kind in every if not options.type or kind.name in options.type]
    complete = [search(capability, kinds) for capability in options.capability or CAPABILITIES]
    return int(not all(complete))


if __name__ == "__main__":
    sys.exit(main())
