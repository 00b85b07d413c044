"""Several sequences in one pass on ggml: every row gives the bits of its sequence's own pass.

Blocks too: drafts, and with them statistics, must not depend on who else is served.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import pytest
from company_checks import assert_company_changes_nothing_here, check_examples
from ggml_models import loaded, small_file

from orthrus_gguf.runtime import host_model
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES
from orthrus_gguf.runtime.ggml import sequences
from orthrus_gguf.runtime.passes import Piece, cut
from orthrus_gguf.runtime.protocol import View

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


def test_the_fixed_company_is_fine(path: Path) -> None:
    with loaded(path) as model:
        assert_company_changes_nothing_here(model)


# --- that these tests can fail ---


def test_blocks_out_of_place_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks one behind the other as they come in the pass, whosesoever they are."""

    def packed(*args: Any) -> list[list[Piece]]:
        passes = cut(*args)
        for pieces in passes:
            taken = 0
            for number, piece in enumerate(pieces):
                if piece.segment.view is View.DIFFUSION:
                    pieces[number] = replace(piece, offset=taken)
                    taken += piece.count
        return passes

    monkeypatch.setattr(host_model, "cut", packed)
    with loaded(path) as model, pytest.raises(AssertionError, match="diffusion rows"):
        assert_company_changes_nothing_here(model)


def test_ragged_column_counts_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "columns_for", lambda rows: rows)
    with loaded(path) as model, pytest.raises(AssertionError, match="ar rows"):
        assert_company_changes_nothing_here(model)
