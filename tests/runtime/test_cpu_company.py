"""Several sequences in one pass on the native kernels: every row, blocks too, gives the bits of its
sequence's own pass."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from company_checks import assert_company_changes_nothing_here, check_examples
from cpu_models import append, cache_of, loaded, small_file

from orthrus_gguf.runtime import host_model
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES
from orthrus_gguf.runtime.cpu import model as model_module
from orthrus_gguf.runtime.cpu.rows import Place, place_block
from orthrus_gguf.runtime.passes import Piece, cut
from orthrus_gguf.runtime.protocol import View, ar_segment, diffusion_segment

CACHE_PAIRS = list(product(CACHE_TYPES, CACHE_TYPES))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Products with quantized weights round rows to bytes, which hides small differences.
    return small_file(tmp_path_factory.mktemp("company"), gguf.GGMLQuantizationType.F32)


@pytest.mark.parametrize(("k", "v"), CACHE_PAIRS)
def test_every_cache_type(path: Path, k: str, v: str) -> None:
    with loaded(path, cache_type_k=k, cache_type_v=v) as model:
        check_examples(model, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "v"), CACHE_PAIRS)
def test_every_cache_type_at_length(path: Path, k: str, v: str) -> None:
    with loaded(path, cache_type_k=k, cache_type_v=v) as model:
        check_examples(model, 200)


def test_several_threads(path: Path) -> None:
    with loaded(path, threads=2) as model:
        check_examples(model, 2)


def test_quantized_weights(tmp_path: Path) -> None:
    with loaded(small_file(tmp_path, gguf.GGMLQuantizationType.Q4_K)) as model:
        check_examples(model, 10)


def test_more_sequences_than_a_pass_has_rows(path: Path) -> None:
    """300 of one row each: several passes, and each finds its own cache."""
    with loaded(path) as model:
        caches = [cache_of(model, range(i % 5), 8) for i in range(300)]
        segments = [ar_segment(cache, [i % 300], i % 5) for i, cache in enumerate(caches)]
        together = model.logits(segments)
        for i in (0, 63, 64, 191, 192, 299):
            (alone,) = model.logits([segments[i]])
            np.testing.assert_array_equal(together[i], alone)


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_more_blocks_than_one_pass_holds(path: Path, rows: int) -> None:
    """Each as if alone, bit for bit, wherever it lies; and the cache is full to its last row."""
    with loaded(path) as model:
        cache = cache_of(model, range(61), 61)
        blocks = [diffusion_segment(cache, 5 + i, 319, rows, 61 - i) for i in range(40)]
        together = model.logits(blocks)
        for block, found in zip(blocks, together, strict=True):
            np.testing.assert_array_equal(model.logits([block])[0], found)


def test_the_fixed_company_is_fine(path: Path) -> None:
    with loaded(path) as model:
        assert_company_changes_nothing_here(model)


# --- that these tests can fail ---


def test_blocks_on_top_of_one_another_would_be_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stacked(*args: Any) -> list[list[Piece]]:
        return [[replace(piece, offset=0) for piece in pieces] for pieces in cut(*args)]

    monkeypatch.setattr(host_model, "cut", stacked)
    with loaded(path) as model:
        cache = cache_of(model, range(30), 64)
        blocks = [diffusion_segment(cache, 5 + i, 319, 16, 30) for i in range(2)]
        alone = [model.logits([block])[0] for block in blocks]
        with pytest.raises(AssertionError):
            np.testing.assert_array_equal(model.logits(blocks), alone)
        monkeypatch.undo()
        np.testing.assert_array_equal(model.logits(blocks), alone)


def test_blocks_out_of_place_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks one behind the other as they come in the pass, whosesoever they are."""

    def packed(*args: Any) -> list[list[Piece]]:
        passes = cut(*args)
        for pieces in passes:
            taken = 0
            for number, piece in enumerate(pieces):
                if piece.segment.view is View.DIFFUSION:
                    pieces[number] = replace(piece, offset=taken + 3 * (taken > 0))
                    taken += piece.count
        return passes

    monkeypatch.setattr(host_model, "cut", packed)
    with loaded(path) as model, pytest.raises(AssertionError, match="diffusion rows"):
        assert_company_changes_nothing_here(model)


def test_blocks_within_the_committed_rows_would_be_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def early(start: int, count: int, column: int) -> Place:
        return place_block(start, count, max(column - 32, 0))

    monkeypatch.setattr(model_module, "place_block", early)
    with loaded(path) as model, pytest.raises(AssertionError, match=r"rows of segment|behind"):
        assert_company_changes_nothing_here(model)


def test_views_are_kept_apart(path: Path) -> None:
    """A block gives other logits than the same tokens as text."""
    with loaded(path) as model:
        cache = cache_of(model, range(20), 64)
        (block,) = model.logits([diffusion_segment(cache, 5, 319, 4, 20)])
        text = append(model, cache, [5, 319, 319, 319])
        assert np.abs(block - text).max() > 0.01
