"""The ggml runtime's side of the `Model` contract, and what it says when it is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ggml_models import TYPES, loaded, small_file
from synthetic_model import model_shape

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.protocol import Cache, Model, ar_segment, diffusion_segment

DemoFile = Callable[..., Path]


@pytest.fixture(scope="module")
def demo(demo_file: DemoFile) -> Iterator[GgmlModel]:
    """The demo model in F32 all through."""
    with loaded(demo_file("f32"), cache_type_k="f32", cache_type_v="f32") as model:
        yield model


# --- the contract ---


def test_satisfies_the_protocols(demo: GgmlModel) -> None:
    model: Model = demo
    cache = model.new_cache(8)
    assert isinstance(cache, Cache)
    assert "ggml" in model.description
    assert "F32 weights" in model.description


def test_only_wanted_rows_are_returned(demo: GgmlModel) -> None:
    tokens = list(range(50, 80))
    full = demo.forward([ar_segment(tokens, 0)], demo.new_cache(64))[0].copy()
    for wanted in (range(0), range(29, 30), range(3, 17)):
        cache = demo.new_cache(64)
        (rows,) = demo.forward([ar_segment(tokens, 0, wanted=wanted)], cache)
        assert cache.length == 30
        np.testing.assert_array_equal(rows, full[wanted.start : wanted.stop])
        (following,) = demo.forward([ar_segment([9], 30)], cache)
        assert following.shape == (1, demo.config.n_vocab)


def test_wanted_rows_of_mixed_segments(demo: GgmlModel) -> None:
    cache = demo.new_cache(64)
    segments = [
        ar_segment(range(10), 0, wanted=range(4, 6)),
        diffusion_segment(3, 4095, 8, 10, wanted=range(0)),
        diffusion_segment(3, 4095, 8, 10, wanted=range(1, 8)),
    ]
    shapes = [rows.shape[0] for rows in demo.forward(segments, cache)]
    assert shapes == [2, 0, 7]


def test_blocks_leave_no_trace(demo: GgmlModel) -> None:
    tokens = list(range(100, 130))
    clean = demo.new_cache(64)
    expected = demo.forward([ar_segment(tokens, 0)], clean)[0].copy()
    cache = demo.new_cache(64)
    rows = []
    for i in range(0, 30, 5):
        (block,) = demo.forward([diffusion_segment(tokens[i], 4095, 16, i)], cache)
        assert cache.length == i
        assert block.shape[0] == 16
        rows.append(demo.forward([ar_segment(tokens[i : i + 5], i)], cache)[0].copy())
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_a_block_at_the_end_of_the_context(demo: GgmlModel) -> None:
    cache = demo.new_cache(20)
    demo.forward([ar_segment(range(20), 0)], cache)
    (rows,) = demo.forward([diffusion_segment(5, 4095, 16, 20)], cache)
    roomy = demo.new_cache(64)
    demo.forward([ar_segment(range(20), 0)], roomy)
    expected = demo.forward([diffusion_segment(5, 4095, 16, 20)], roomy)[0]
    np.testing.assert_array_equal(rows, expected)


def test_more_blocks_than_one_pass_holds(demo: GgmlModel) -> None:
    """20 blocks of 16 rows: several passes, each block as if alone."""
    cache = demo.new_cache(64)
    demo.forward([ar_segment(range(30), 0)], cache)
    blocks = [diffusion_segment(5 + i, 4095, 16, 30 - i) for i in range(20)]
    together = [rows.copy() for rows in demo.forward(blocks, cache)]
    for block, rows in zip(blocks, together, strict=True):
        # Not to the bit: its rows lie elsewhere in the cache, so they are summed in other lanes.
        (alone,) = demo.forward([block], cache)
        np.testing.assert_allclose(rows, alone, rtol=0, atol=1e-4)


def test_truncated_rows_are_forgotten(demo: GgmlModel) -> None:
    cache = demo.new_cache(64)
    demo.forward([ar_segment(range(10), 0)], cache)
    expected = demo.forward([ar_segment([11, 12], 10)], cache)[0].copy()
    cache.truncate(10)
    demo.forward([ar_segment(range(200, 230), 10)], cache)
    cache.truncate(10)
    found = demo.forward([ar_segment([11, 12], 10)], cache)[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cache_type_v", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("poison", [np.inf, np.nan, 3e38])
def test_wild_drafts_never_reach_ar_rows(tmp_path: Path, poison: float, cache_type_v: str) -> None:
    """Blocks with infinite keys and values leave those in rows that AR rows must not feel."""
    path = small_file(tmp_path, TYPES.F32)
    with ModelFile.open(path) as file, path.open("r+b") as raw:
        for name in ("attn_k_diff", "attn_v_diff", "attn_k_norm_diff"):
            info = file.tensors[f"blk.0.{name}.weight"]
            raw.seek(info.offset)
            raw.write(np.full(info.n_bytes // 4, poison, np.float32).tobytes())
    with loaded(path, cache_type_v=cache_type_v) as model:
        tokens = list(range(40, 60))
        expected = model.forward([ar_segment(tokens, 0)], model.new_cache(64))[0].copy()
        cache = model.new_cache(64)
        model.forward([ar_segment(tokens[:10], 0)], cache)
        model.forward([diffusion_segment(5, 319, 16, 10)], cache)
        segments = [ar_segment(tokens[10:], 10), diffusion_segment(5, 319, 16, 12)]
        found = model.forward(segments, cache)[0]
        np.testing.assert_array_equal(found, expected[10:])


def test_interrupted_prompts_leave_the_cache_as_it_was(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(demo_file("f32"), batch_rows=8) as model:
        cache = model.new_cache(64)
        model.forward([ar_segment(range(5), 0)], cache)
        compute, calls = model._api.backend_graph_compute, []

        def interrupted(backend: int, graph: int) -> int:
            calls.append(graph)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return int(compute(backend, graph))

        monkeypatch.setattr(model._api, "backend_graph_compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward([ar_segment(range(40), 5)], cache)
        assert cache.length == 5


# --- errors ---


def test_tokens_outside_the_vocabulary(demo: GgmlModel) -> None:
    for token in (-1, 4096, 1 << 40):
        with pytest.raises(OrthrusError, match=f"token {token} is outside the vocabulary of 4096"):
            demo.forward([ar_segment([1, token, 2], 0)], demo.new_cache(8))


def test_blocks_need_heads(tmp_path: Path) -> None:
    path = small_file(tmp_path, TYPES.F32, model_shape(block_size=None))
    with loaded(path) as model:
        cache = model.new_cache(32)
        model.forward([ar_segment([1, 2], 0)], cache)
        with pytest.raises(OrthrusError, match="has no diffusion heads"):
            model.forward([diffusion_segment(1, 2, 4, 2)], cache)


def test_misuse_is_a_value_error(demo: GgmlModel, demo_file: DemoFile) -> None:
    cache = demo.new_cache(8)
    with pytest.raises(ValueError, match="has room for 8"):
        demo.forward([ar_segment(range(9), 0)], cache)
    with pytest.raises(ValueError, match="block of 129 rows"):
        demo.forward([diffusion_segment(1, 2, 129, 0)], cache)
    cache.close()
    with pytest.raises(ValueError, match="closed"):
        demo.forward([ar_segment([1], 0)], cache)
    with loaded(demo_file("f32")) as other, pytest.raises(ValueError, match="another model"):
        other.forward([ar_segment([1], 0)], demo.new_cache(8))


def test_a_closed_model_says_so(demo_file: DemoFile) -> None:
    with loaded(demo_file("f32")) as model:
        cache = model.new_cache(8)
    model.close()
    with pytest.raises(OrthrusError, match="closed"):
        model.forward([ar_segment([1], 0)], cache)
    with pytest.raises(OrthrusError, match="closed"):
        model.new_cache(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 0}, "--threads 0"),
        ({"threads": 1000}, "--threads 1000"),
        ({"batch_rows": 0}, "-b 0"),
        ({"cache_type_k": "q5_0"}, "-ctk q5_0: expected one of f32, f16, q8_0, q4_0"),
    ],
)
def test_impossible_settings(demo_file: DemoFile, settings: dict[str, Any], message: str) -> None:
    with ModelFile.open(demo_file("f32")) as file, pytest.raises(OrthrusError, match=message):
        GgmlModel.load(file, **settings)
