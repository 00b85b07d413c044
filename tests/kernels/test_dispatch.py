"""Kernel selection is a pure function: what may follow the rows does, what may not does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, TRAITS, Layout
from orthrus_kernels.products.dispatch import (
    Tile,
    choose,
    fit_tile,
    layout_for,
    load_table,
    row_tile,
    safe_tile,
    save_table,
    split_for,
    table_name,
    tile_key,
)

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
SHAPES = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096), (100, 288)]


@pytest.mark.parametrize("kind", [*TRAITS, *PLAIN_TYPES], ids=lambda kind: kind.name)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_change_nothing_that_bits_depend_on(kind: T, capability: int) -> None:
    for n, k in SHAPES:
        choices = [choose(rows, kind, n, k, capability) for rows in range(1, 65)]
        assert len({(choice.layout, choice.split) for choice in choices}) == 1
        assert all(choice.tile.rows >= rows for rows, choice in enumerate(choices, 1))
        padded = -(-n // 64) * 64
        assert all(padded % choice.tile.n == 0 for choice in choices)


def test_splits_of_qwen3_8b() -> None:
    assert [split_for(n, k) for n, k in SHAPES[:5]] == [2, 4, 1, 4, 1]
    assert split_for(100, 288) == 1


def test_int8_only_where_it_pays() -> None:
    assert layout_for(T.Q4_K, 86) is Layout.A8
    assert layout_for(T.Q4_K, 90) is Layout.A16
    assert layout_for(T.Q6_K, 86) is Layout.A16
    assert layout_for(T.Q2_K, 86) is Layout.A8
    assert layout_for(T.Q2_K, 80) is Layout.A16
    assert layout_for(T.F16, 86) is Layout.A16


def test_row_tiles() -> None:
    assert [row_tile(rows) for rows in (1, 16, 17, 32, 33, 64, 65)] == [16, 16, 32, 32, 64, 64, 64]


def test_narrow_matrix_gets_a_narrow_tile() -> None:
    wide = Tile(32, 128, 8, 3)
    assert fit_tile(wide, 4096) == wide
    assert fit_tile(wide, 64 * 3) == Tile(32, 64, 4, 3)


def test_tuned_table_round_trip(tmp_path: Path) -> None:
    name = "NVIDIA GeForce RTX 3090"
    assert table_name(name) == "nvidia-geforce-rtx-3090.json"
    assert load_table(name, tmp_path / "nowhere") == {}
    key = tile_key(Layout.A8, T.Q4_K, 4096, 4096, 20)
    assert key == "a8/Q4_K/4096x4096/32"
    save_table(name, {key: Tile(32, 128, 4, 2)}, tmp_path)
    table = load_table(name, tmp_path)
    assert choose(20, T.Q4_K, 4096, 4096, 86, table).tile == Tile(32, 128, 4, 2)
    assert choose(20, T.Q4_K, 6144, 4096, 86, table).tile.n == 64
    stale = {tile_key(Layout.A8, T.Q4_K, 192, 4096, 1): Tile(16, 128, 4, 2)}
    with pytest.raises(ValueError, match="run the tuner again"):
        choose(1, T.Q4_K, 192, 4096, 86, stale)


def test_a_second_matrix_may_want_its_own_tile() -> None:
    """A use without an entry takes the product's tile; an unknown type takes the first one."""
    for rows in (1, 32, 64):
        plain = safe_tile(Layout.A16, T.Q4_K, rows, 86)
        assert safe_tile(Layout.A16, T.Q4_K, rows, 86, second=T.F16) == plain
        pair = choose(rows, T.Q4_K, 6144, 4096, 86, layout=Layout.A16, second=T.Q6_K)
        assert pair.tile == safe_tile(Layout.A16, T.Q4_K, rows, 86, second=T.Q6_K)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        choose(0, T.Q4_K, 64, 256, 86)
