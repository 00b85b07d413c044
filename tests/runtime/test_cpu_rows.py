"""Row invariance on the native kernels: the AR logits of a row are the same bits whatever runs
beside it. The reference is a fresh cache and one row per pass.

Contexts cross the edges of panels (16 columns), of groups (64) and of chunks (256).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import gguf
import numpy as np
import pytest
from cpu_cases import WEIGHTS
from cpu_models import append, cache_of, loaded, small_file
from numpy.typing import NDArray

from orthrus_gguf.runtime.cache_layout import CACHE_TYPES
from orthrus_gguf.runtime.cpu.cache import CpuCache
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.cpu.steps import Builder
from orthrus_gguf.runtime.protocol import Segment, diffusion_segment

Array = NDArray[np.float32]
Make = Callable[..., Any]

ROWS = (2, 3, 7, 16, 33)
TOKENS: list[int] = np.random.default_rng(0).integers(0, 300, 80).tolist()
LONG: list[int] = np.random.default_rng(1).integers(0, 300, 540).tolist()
CACHE_PAIRS = list(product(CACHE_TYPES, CACHE_TYPES))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(weights, **settings)`: a small model with random weights of one type."""
    folder = tmp_path_factory.mktemp("rows")

    def make(weights: str, **settings: Any) -> Any:
        path = folder / f"{weights}.gguf"
        if not path.exists():
            small_file(folder, gguf.GGMLQuantizationType[weights])
        return loaded(path, batch_rows=512, **settings)

    return make


def logits_in_passes_of(model: CpuModel, tokens: Sequence[int], rows: int, start: int = 0) -> Array:
    """AR logits of tokens[start:], `rows` rows per pass, after a prompt of the others."""
    cache = cache_of(model, tokens[:start], 1024)
    passes = [append(model, cache, tokens[i : i + rows]) for i in range(start, len(tokens), rows)]
    return np.concatenate(passes)


def assert_invariant(model: CpuModel, rows: Sequence[int] = ROWS) -> None:
    alone = logits_in_passes_of(model, TOKENS, 1)
    assert np.isfinite(alone).all()
    assert len(np.unique(alone, axis=0)) > len(TOKENS) / 2  # not some constant
    for count in (*rows, len(TOKENS)):
        together = logits_in_passes_of(model, TOKENS, count)
        np.testing.assert_array_equal(together, alone, err_msg=f"{count} rows per pass")
    assert_blocks_change_nothing(model, alone)


def assert_blocks_change_nothing(model: CpuModel, alone: Array) -> None:
    """Verify rows that share their pass with blocks, at contexts on both sides of edges."""
    cache = cache_of(model, TOKENS[:10], 1024)
    for start in range(10, 73, 7):
        verified = append(model, cache, TOKENS[start : start + 7], *fused_blocks(cache, start))
        np.testing.assert_array_equal(verified, alone[start : start + 7], err_msg=f"at {start}")


def fused_blocks(cache: CpuCache, start: int) -> list[Segment]:
    """One block anchored at an accepted draft, one behind the verified rows."""
    return [
        diffusion_segment(cache, 5, 319, 16, start + 3),
        diffusion_segment(cache, 9, 319, 11, start + 7),
    ]


@pytest.mark.parametrize("weights", [kind.name for kind in WEIGHTS])
def test_every_weight_type(make: Make, weights: str) -> None:
    with make(weights) as model:
        assert_invariant(model)


@pytest.mark.parametrize(("k", "v"), CACHE_PAIRS)
def test_every_cache_type(make: Make, k: str, v: str) -> None:
    with make("Q4_K", cache_type_k=k, cache_type_v=v) as model:
        assert_invariant(model, rows=(3, 16))


@pytest.mark.parametrize("types", [("f32", "f32"), ("f16", "f16"), ("q8_0", "q4_0")])
def test_long_contexts(make: Make, types: tuple[str, str]) -> None:
    """From 490 to 540 rows, so that sums go on from chunk to chunk."""
    with make("F32", cache_type_k=types[0], cache_type_v=types[1]) as model:
        alone = logits_in_passes_of(model, LONG, 1, start=490)
        for count in (3, 32, 50):
            together = logits_in_passes_of(model, LONG, count, start=490)
            np.testing.assert_array_equal(together, alone, err_msg=f"{count} rows per pass")
        one_by_one = logits_in_passes_of(model, LONG, 1)[490:]
        np.testing.assert_array_equal(one_by_one, alone, err_msg="prompt of single rows")


def test_several_threads(make: Make) -> None:
    with make("Q4_K") as model:
        alone = logits_in_passes_of(model, TOKENS, 1)
    for threads in (2, 3):
        with make("Q4_K", threads=threads) as model:
            np.testing.assert_array_equal(logits_in_passes_of(model, TOKENS, 7), alone)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [kind.name for kind in WEIGHTS])
def test_every_weight_type_with_every_cache_type(make: Make, weights: str) -> None:
    for k, v in CACHE_PAIRS:
        with make(weights, cache_type_k=k, cache_type_v=v) as model:
            assert_invariant(model, rows=(*ROWS, 5, 64))


# --- that these tests can fail ---


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of attention that depends on how many rows there are, in its last bits."""
    add = Builder.add

    def wrong(self: Builder, op: int, tasks: int, **values: Any) -> None:
        if "scale" in values:
            values["scale"] *= 1 + (self.shape.rows > 1) * 2.0**-22
        add(self, op, tasks, **values)

    monkeypatch.setattr(Builder, "add", wrong)


@pytest.mark.usefixtures("careless")
def test_steps_for_many_rows_would_be_noticed(make: Make) -> None:
    with make("F32") as model, pytest.raises(AssertionError, match="rows per pass"):
        assert_invariant(model)
