"""Trees on ggml: each row gives the bits that it gives when its path is the text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
from ggml_models import loaded, small_file
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_lists import parents_of_trees
from synthetic_model import model_shape
from tree_checks import STARTS, TREE, assert_bits, cache_at, row_tokens

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime import trees as layouts
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES, COLUMNS
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.protocol import ar_segment, depths, diffusion_segment, path_to
from orthrus_gguf.runtime.trees import fitting_rows, tree_layout

CACHE_PAIRS = list(product(CACHE_TYPES, CACHE_TYPES))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Products with quantized weights round rows to bytes, which hides small differences.
    return small_file(tmp_path_factory.mktemp("trees"), gguf.GGMLQuantizationType.F32)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[GgmlModel]:
    with loaded(path) as model:
        yield model


@pytest.mark.parametrize(("k", "v"), CACHE_PAIRS)
def test_every_cache_type(path: Path, k: str, v: str) -> None:
    with loaded(path, cache_type_k=k, cache_type_v=v) as model:
        for start in (62, 65):
            assert_bits(model, start, TREE)


@pytest.mark.parametrize("start", STARTS)
def test_edges_of_groups(model: GgmlModel, start: int) -> None:
    assert_bits(model, start, TREE)


@settings(deadline=None, max_examples=15)
@given(parents_of_trees(), st.integers(1, 140))
def test_any_tree(model: GgmlModel, parents: list[int], start: int) -> None:
    assert_bits(model, start, parents, seed=start)


def test_a_deep_branch_spans_groups(model: GgmlModel) -> None:
    """Branch and trunk of 70 rows each: regions of two and three groups."""
    parents = [-1, *range(70), 0, *range(71, 140)]
    assert_bits(model, 60, parents)


def test_several_threads(path: Path) -> None:
    with loaded(path, threads=2) as model:
        assert_bits(model, 63, TREE)


def test_only_wanted_rows(model: GgmlModel) -> None:
    cache = cache_at(model, 30)
    tokens = row_tokens(TREE)
    (logits,) = model.logits([ar_segment(cache, tokens, 30, parents=TREE)])
    segment = ar_segment(cache, tokens, 30, parents=TREE, wanted=range(4, 9))
    np.testing.assert_array_equal(model.logits([segment])[0], logits[4:9])


@pytest.mark.parametrize("poison", [np.inf, np.nan])
@pytest.mark.parametrize("cache_type_v", ["f32", "f16", "q8_0"])
def test_damaged_rows_stay_among_themselves(
    tmp_path: Path, poison: float, cache_type_v: str
) -> None:
    """A token without a sane embedding ruins its own branch, and nothing beside or after it."""
    bad = 310
    path = small_file(tmp_path, gguf.GGMLQuantizationType.F32, model_shape(tied=False))
    with ModelFile.open(path) as file, path.open("r+b") as raw:
        embedding = file.tensors["token_embd.weight"]
        row_bytes = embedding.n_bytes // file.config.n_vocab
        raw.seek(embedding.offset + bad * row_bytes)
        raw.write(np.full(row_bytes // 4, poison, np.float32).tobytes())
    damaged = row_tokens(TREE)
    damaged[5] = bad
    clean = [row for row in range(len(TREE)) if 5 not in path_to(row, TREE)]
    with loaded(path, cache_type_v=cache_type_v) as model:
        for start in (40, 63):
            cache = cache_at(model, start)
            sane = ar_segment(cache, row_tokens(TREE), start, parents=TREE)
            (expected,) = model.logits([sane])
            (logits,) = model.logits([ar_segment(cache, damaged, start, parents=TREE)])
            assert not np.isfinite(logits[5]).any()
            np.testing.assert_array_equal(logits[clean], expected[clean])
            np.testing.assert_array_equal(model.logits([sane])[0], expected)


# --- room, and what is refused ---


def test_trees_are_cut_to_the_room_that_there_is(model: GgmlModel) -> None:
    """Capacity 100 and 128 rows for blocks: four groups of columns, of which two are free."""
    cache = cache_at(model, 90, capacity=100)
    assert cache.rows == 4 * COLUMNS
    assert cache.fit(TREE[:5]) == 5
    assert cache.fit(TREE) == 10, "trunk and two branches of one group each"
    tokens = row_tokens(TREE)
    model.logits([ar_segment(cache, tokens[:10], 90, parents=TREE[:10])])
    with pytest.raises(ValueError, match=r"13 rows with 5 leaves at 90 needs 384 .* there are 256"):
        model.logits([ar_segment(cache, tokens, 90, parents=TREE)])
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit([0])
    assert cache.length == 90


def test_the_deepest_row_must_fit_the_context(model: GgmlModel) -> None:
    cache = cache_at(model, 96, capacity=100)
    with pytest.raises(ValueError, match="ends at 102, the cache has room for 100"):
        model.logits([ar_segment(cache, row_tokens(TREE), 96, parents=TREE)])


def test_only_paths_of_the_last_pass_are_kept(model: GgmlModel) -> None:
    cache = cache_at(model, 20)
    segment = ar_segment(cache, row_tokens(TREE), 20, parents=TREE)
    for rows in ([0, 2], [1], [0, 5, 6, 7, 8], [0, 99], [0, -1], [0, 1, 2, 3, 4, 11, 12]):
        model.logits([segment])
        with pytest.raises(ValueError, match="no path of the tree that is pending"):
            cache.commit(rows)
        assert cache.length == 20
    model.logits([segment])
    cache.commit([])
    for forget in (
        lambda: model.logits([diffusion_segment(cache, 5, 319, 16, 20)]),
        lambda: cache.restore(cache.checkpoint()),
    ):
        model.logits([segment])
        forget()
        with pytest.raises(ValueError, match="no AR rows are pending"):
            cache.commit([0])
    assert cache.length == 20


@given(parents_of_trees(), st.integers(0, 300))
def test_layouts(parents: list[int], start: int) -> None:
    """Regions keep to themselves, and hold their path in the order and lanes of a chain."""
    layout = tree_layout(parents, start)
    depth = depths(parents)
    assert len({column for _, column in layout.stores}) == len(layout.stores), "no two in one place"
    assert all(layout.edge + COLUMNS > start >= layout.edge for _ in parents)
    stored = {column: row for row, column in layout.stores}
    for row, home in enumerate(layout.home):
        assert home % COLUMNS == 0
        assert (layout.column(row) - start - depth[row]) % COLUMNS == 0
        first = home + start - layout.edge
        path = [stored[column] for column in range(first, layout.column(row) + 1)]
        assert path == path_to(row, parents)
    needs = [tree_layout(parents[:count], start).columns for count in range(1, len(parents) + 1)]
    for columns in {*needs, needs[0] - 1, needs[-1] - 1}:
        fitting = sum(need <= columns for need in needs)
        assert fitting_rows(parents, start, columns) == max(fitting, 1)
    assert needs == sorted(needs)
    used = start + max(depth) + 1
    assert all(region >= used for region in layout.regions)
    assert layout.columns >= max(stored) + 1


# --- that these tests can fail ---


@pytest.mark.parametrize("columns", [8, 40])
def test_regions_out_of_step_would_be_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(layouts, "COLUMNS", columns)
    with loaded(path) as model, pytest.raises(AssertionError, match="path"):
        assert_bits(model, 62, TREE)


def test_missing_copies_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GgmlCache, "_copy", lambda *_: None)
    with loaded(path) as model, pytest.raises(AssertionError, match="path"):
        assert_bits(model, 62, TREE)
