"""Find, offline, a tile for every type, row tile and architecture that compiles without spills.

    python -m orthrus_kernels.safe_tiles [--capability 86]

ptxas trades a few registers for spills in ways that no formula predicts, so the candidates are
compiled in order and the first clean one is kept, in tuned/offline.json. Takes minutes; needed only
when a kernel changes so that a test of tests/kernels/test_offline_matmul.py finds a spill. Entries
for single uses (`a8/Q4_K/32/gate_up`) are set by hand where that test asks for one, and kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from gguf import GGMLQuantizationType

from orthrus_kernels.dispatch import HALF_RATE_SUMS, INT8_TYPES, Tile, first_tile, tuned_directory
from orthrus_kernels.matmul_cases import ROWS, matmul_cases
from orthrus_kernels.offline import (
    CAPABILITIES,
    SHARED_MEMORY_LIMIT,
    Resources,
    compile_case,
)
from orthrus_kernels.quant_tensor import PLAIN_TYPES, TRAITS, Layout


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


def layouts(kind: GGMLQuantizationType, capability: int) -> tuple[Layout, ...]:
    """int8 products are for the cards where they pay."""
    int8 = kind in INT8_TYPES and capability in HALF_RATE_SUMS
    return (Layout.A16, Layout.A8) if int8 else (Layout.A16,)


def find_tile(
    kind: GGMLQuantizationType, layout: Layout, rows: int, capability: int
) -> Tile | None:
    """The first clean candidate, or None."""
    for tile in dict.fromkeys(candidates(rows, capability)):
        (case,) = matmul_cases(kind, layout, rows, tiles={tile: (capability,)})
        if clean(compile_case(case, capability).report(), capability):
            return tile
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, print, and update tuned/offline.json."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_kernels.safe_tiles")
    parser.add_argument("--capability", type=int, action="append")
    options = parser.parse_args(arguments)
    path = tuned_directory() / "offline.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    failed = False
    for capability in options.capability or CAPABILITIES:
        found: dict[str, list[int]] = {}
        for kind in (*TRAITS, *PLAIN_TYPES):
            for layout in layouts(kind, capability):
                for rows in ROWS:
                    tile = find_tile(kind, layout, rows, capability)
                    key = f"{layout.value}/{kind.name}/{rows}"
                    print(f"sm_{capability} {key}: {tile}", flush=True)
                    failed |= tile is None
                    if tile is not None:
                        found[key] = [tile.rows, tile.n, tile.warps, tile.stages]
        table = json.loads(path.read_text()) if path.exists() else {}
        by_hand = {
            key: tile
            for key, tile in table.get(str(capability), {}).items()
            if key.count("/") == 3  # layout/type/rows/use
        }
        table[str(capability)] = {**found, **by_hand}
        path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
