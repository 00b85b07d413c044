"""Which kernel and which tile for a product: pure functions, tested without a GPU.

What a row's bits depend on (kind of activations, split-K) follows from the weight type, its shape
and the card, never from the number of rows. Tile shapes, warps and stages do not change bits: they
may follow the rows, and the tuner may choose them.
"""

from __future__ import annotations

import enum
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from orthrus_kernels.packing.quant_tensor import PANEL_ROWS, STEP, TRAITS, Layout

_T = GGMLQuantizationType

INT8_TYPES = frozenset(TRAITS)
"""Types with an int8 kernel: all quantized ones."""

MAX_ROWS = 64
"""More rows than this go through the prompt path (dequantize, then a dense product)."""

HALF_RATE_SUMS = frozenset({75, 86, 89, 120})
"""Cards whose fp16 MMA with fp32 sums runs at half rate (GeForce): int8 products pay there."""


class Use(enum.Enum):
    """Which of the product's kernels: each has registers of its own to watch."""

    MATMUL = "matmul"
    GATE_UP = "gate_up"
    HEAD = "head"


@dataclass(frozen=True)
class Tile:
    """Shape of one program: rows of x, rows of W, warps, pipeline stages."""

    rows: int
    n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Choice:
    """Everything a launch needs besides the tensors."""

    layout: Layout
    split: int
    tile: Tile


TunedTable = Mapping[str, Tile]
"""`tile_key` -> tile, for one device."""


def layout_for(kind: GGMLQuantizationType, capability: int) -> Layout:
    """Activations for a weight type on a card. Fixed when a tensor is packed.

    Q6_K needs two int8 dots per 32 weights, which costs more than its fp16 form: it stays with
    fp16 everywhere (`weights_a8` tells how Q2_K and Q3_K avoid that).
    """
    int8 = kind in INT8_TYPES and kind != _T.Q6_K
    return Layout.A8 if int8 and capability in HALF_RATE_SUMS else Layout.A16


def split_for(n: int, k: int) -> int:
    """Parts of K that are summed apart, so that narrow matrices fill a card: by shape only."""
    tiles = -(-n // PANEL_ROWS)
    wanted = 1 if tiles >= 192 else 2 if tiles >= 96 else 4 if tiles >= 48 else 8
    steps = -(-k // STEP)
    while wanted > 1 and steps < 2 * wanted:
        wanted //= 2
    return wanted


def row_tile(rows: int) -> int:
    """The smallest row tile that holds the rows (64 for more)."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def safe_tile(
    layout: Layout,
    kind: GGMLQuantizationType,
    rows: int,
    capability: int,
    use: Use = Use.MATMUL,
    second: GGMLQuantizationType | None = None,
) -> Tile:
    """A tile that was compiled for this architecture without spills and fits its shared memory.

    tuned/offline.json holds what `python -m orthrus_kernels.products.safe_tiles` found; an
    architecture that is not in it takes the entry of the nearest older one. Gate+up and head
    share the tile of the plain product unless they have an entry of their own
    (`a8/Q4_K/32/gate_up`), and so does a product with a `second` matrix of another type
    (`a8/Q4_K/32/Q6_K`).
    """
    table = _offline_tiles()
    older = [known for known in table if known <= capability]
    key = f"{layout.value}/{kind.name}/{row_tile(rows)}"
    if older:
        tiles = table[max(older)]
        for found in (f"{key}/{second.name if second else use.value}", key):
            if found in tiles:
                return tiles[found]
    return first_tile(rows, capability)


def first_tile(rows: int, capability: int) -> Tile:
    """The tile to try first: one panel for four warps, two for eight where wgmma is used."""
    tile = row_tile(rows)
    if capability == 90:
        return Tile(tile, 2 * PANEL_ROWS, 8, 3 if tile < 64 else 2)
    return Tile(tile, PANEL_ROWS, 4, 3 if tile < 64 else 2)


@functools.cache
def _offline_tiles() -> dict[int, dict[str, Tile]]:
    path = tuned_directory() / "offline.json"
    if not path.exists():
        return {}
    return {
        int(capability): {key: Tile(*values) for key, values in tiles.items()}
        for capability, tiles in json.loads(path.read_text()).items()
    }


def tile_key(layout: Layout, kind: GGMLQuantizationType, n: int, k: int, rows: int) -> str:
    """Key of a tuned table: `a16/Q4_K/6144x4096/32`, with the row tile last."""
    return f"{layout.value}/{kind.name}/{n}x{k}/{row_tile(rows)}"


def choose(
    rows: int,
    kind: GGMLQuantizationType,
    n: int,
    k: int,
    capability: int,
    tuned: TunedTable | None = None,
    layout: Layout | None = None,
    use: Use = Use.MATMUL,
    second: GGMLQuantizationType | None = None,
) -> Choice:
    """The launch for `rows` rows of x and a matrix [n, k].

    `layout`: of the packed tensor. `second`: type of the matrix that continues the columns, if any
    (its padded rows must be a multiple of the tile too: `fit_tile`).

    ValueError for sizes that are not positive, or a tuned tile that does not divide the panels.
    """
    if rows < 1 or n < 1 or k < 1:
        raise ValueError(f"rows {rows}, n {n} and k {k} must be positive")
    if layout is None:
        layout = layout_for(kind, capability)
    tile = (tuned or {}).get(tile_key(layout, kind, n, k, rows))
    if tile is None:
        tile = fit_tile(safe_tile(layout, kind, rows, capability, use, second), n)
    elif fit_tile(tile, n) != tile:
        raise ValueError(
            f"tuned tile of {tile.n} rows does not divide {n} rows padded to {PANEL_ROWS}: "
            "run the tuner again"
        )
    return Choice(layout, split_for(n, k), tile)


def fit_tile(tile: Tile, n: int) -> Tile:
    """The tile, with n cut to one panel where it does not divide the padded rows."""
    padded = -(-n // PANEL_ROWS) * PANEL_ROWS
    if padded % tile.n == 0:
        return tile
    return Tile(tile.rows, PANEL_ROWS, min(tile.warps, 4), tile.stages)


def table_name(device_name: str) -> str:
    """File name of a device's table: "NVIDIA GeForce RTX 3090" -> nvidia-geforce-rtx-3090.json."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def tuned_directory() -> Path:
    """Where the tables of the package lie."""
    return Path(__file__).parent / "tuned"


@functools.cache
def load_table(device_name: str, directory: Path | None = None) -> TunedTable:
    """The tuned tiles of a device; empty for a device that nobody has tuned (safe tiles serve)."""
    path = (directory or tuned_directory()) / table_name(device_name)
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data.get("version") != 1:
        raise ValueError(f"{path}: version {data.get('version')!r}, expected 1: tune again")
    return {key: Tile(*(int(v) for v in values)) for key, values in data["tiles"].items()}


def save_table(device_name: str, tiles: TunedTable, directory: Path | None = None) -> Path:
    """Write a table: {"version", "device", "tiles": {key: [rows, n, warps, stages]}}."""
    path = (directory or tuned_directory()) / table_name(device_name)
    data = {
        "version": 1,
        "device": device_name,
        "tiles": {
            key: [tile.rows, tile.n, tile.warps, tile.stages] for key, tile in sorted(tiles.items())
        },
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
