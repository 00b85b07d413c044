"""Row invariance: the AR logits of a row are the same bits whatever runs beside it.

The reference is a fresh cache and one row per pass. The contexts cross every edge of the graphs'
column counts up to 128 (see `columns_for`), the long one the edges at 512 and beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
from ggml_models import append, cache_of
from numpy.typing import NDArray
from synthetic_model import model_shape, uniform, write_model

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml import selftest
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.ggml.weights import MULTIPLIABLE
from orthrus_gguf.runtime.protocol import Segment, diffusion_segment

Array = NDArray[np.float32]
MakeModel = Callable[..., GgmlModel]

ROWS = (2, 3, 7, 16, 32)
TOKENS: list[int] = np.random.default_rng(0).integers(0, 300, 140).tolist()
LONG: list[int] = np.random.default_rng(1).integers(0, 300, 640).tolist()
WEIGHT_TYPES = sorted(
    name for name in MULTIPLIABLE if name in gguf.GGMLQuantizationType.__members__
)
CACHE_PAIRS = list(product(CACHE_TYPES, CACHE_TYPES))


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeModel]:
    """`make_model(weights, k, v)`: a small model with random weights of one type."""
    folder = tmp_path_factory.mktemp("rows")
    opened: list[GgmlModel] = []

    def make(weights: str, k: str = "f16", v: str = "f16", threads: int = 1) -> GgmlModel:
        path = folder / f"{weights}.gguf"
        if not path.exists():
            rule = uniform(gguf.GGMLQuantizationType[weights])
            write_model(load_library().api, path, model_shape(), rule)
        with ModelFile.open(path) as file:
            model = GgmlModel.load(
                file, threads=threads, cache_type_k=k, cache_type_v=v, batch_rows=512
            )
        opened.append(model)
        return model

    yield make
    for model in opened:
        model.close()


def logits_in_passes_of(
    model: GgmlModel, tokens: Sequence[int], rows: int, start: int = 0
) -> Array:
    """AR logits of tokens[start:], `rows` rows per pass, after a prompt of the others."""
    cache = cache_of(model, tokens[:start], 1024)
    passes = [append(model, cache, tokens[i : i + rows]) for i in range(start, len(tokens), rows)]
    return np.concatenate(passes)


def assert_invariant(model: GgmlModel, rows: Sequence[int] = ROWS) -> None:
    alone = logits_in_passes_of(model, TOKENS, 1)
    assert np.isfinite(alone).all()
    assert len(np.unique(alone, axis=0)) > len(TOKENS) / 2  # not some constant
    for count in (*rows, len(TOKENS)):
        together = logits_in_passes_of(model, TOKENS, count)
        np.testing.assert_array_equal(together, alone, err_msg=f"{count} rows per pass")
    assert_blocks_change_nothing(model, alone)


def assert_blocks_change_nothing(model: GgmlModel, alone: Array) -> None:
    """Verify rows that share their pass with blocks, at contexts on both sides of an edge."""
    cache = cache_of(model, TOKENS[:40], 1024)
    for start in range(40, 124, 7):
        verified = append(model, cache, TOKENS[start : start + 7], *fused_blocks(cache, start))
        np.testing.assert_array_equal(verified, alone[start : start + 7], err_msg=f"at {start}")


def fused_blocks(cache: GgmlCache, start: int) -> list[Segment]:
    """One block anchored at an accepted draft, one behind the verified rows."""
    return [
        diffusion_segment(cache, 5, 319, 16, start + 3),
        diffusion_segment(cache, 9, 319, 11, start + 7),
    ]


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_every_weight_type(make_model: MakeModel, weights: str) -> None:
    assert_invariant(make_model(weights))


@pytest.mark.parametrize(("k", "v"), CACHE_PAIRS)
def test_every_cache_type(make_model: MakeModel, k: str, v: str) -> None:
    assert_invariant(make_model("Q4_K", k, v))


@pytest.mark.parametrize(("k", "v"), [("f32", "f32"), ("f16", "f16"), ("q8_0", "q8_0")])
def test_long_contexts(make_model: MakeModel, k: str, v: str) -> None:
    """From 500 to 640 rows: where ggml itself would switch to split or tiled attention."""
    model = make_model("Q8_0", k, v)
    alone = logits_in_passes_of(model, LONG, 1, start=500)
    for count in (3, 32, 70, 140):
        together = logits_in_passes_of(model, LONG, count, start=500)
        np.testing.assert_array_equal(together, alone, err_msg=f"{count} rows per pass")
    one_by_one = logits_in_passes_of(model, LONG, 1)[500:]
    np.testing.assert_array_equal(one_by_one, alone, err_msg="prompt of single rows")


def test_several_threads(make_model: MakeModel) -> None:
    alone = logits_in_passes_of(make_model("Q4_K"), TOKENS, 1)
    with make_model("Q4_K", threads=2) as model:
        np.testing.assert_array_equal(logits_in_passes_of(model, TOKENS, 7), alone)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_every_weight_type_with_every_cache_type(make_model: MakeModel, weights: str) -> None:
    for k, v in CACHE_PAIRS:
        assert_invariant(make_model(weights, k, v), rows=(*ROWS, 5, 64, 128))


# --- that these tests can fail ---


def test_ragged_column_counts_would_be_noticed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Column counts that SIMD loops do not divide change the order of sums."""
    monkeypatch.setattr("orthrus_gguf.runtime.ggml.sequences.columns_for", lambda rows: rows)
    with pytest.raises(AssertionError, match="rows per pass"):
        assert_invariant(make_model("F32"))


def test_kernels_for_many_rows_would_be_noticed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ggml's flash attention is tiled from 64 rows on, unless told to keep to plain kernels."""
    for module in ("attention", "cache", "cache_layout", "input_tensors"):
        name = f"orthrus_gguf.runtime.ggml.{module}.transposed"
        monkeypatch.setattr(name, lambda layout: False)
    model = make_model("F32")
    assert_invariant(model)
    model._api.backend_cpu_set_use_ref(model._backend, False)
    with pytest.raises(AssertionError, match="140 rows per pass"):
        assert_invariant(model)


def test_a_library_with_such_kernels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    rule = uniform(gguf.GGMLQuantizationType.Q5_1)
    write_model(load_library().api, path, model_shape(), rule)
    real = selftest._product

    def tiled(api: object, weights: object, qtype: object, x: Array, outputs: int) -> Array:
        result = real(api, weights, qtype, x, outputs)  # type: ignore[arg-type]
        return result if len(x) == 1 else np.nextafter(result, np.float32(9))

    monkeypatch.setattr(selftest, "_product", tiled)
    with (
        ModelFile.open(path) as file,
        pytest.raises(OrthrusError, match="products of a row with Q5_1 depend on the rows beside"),
    ):
        GgmlModel.load(file)
