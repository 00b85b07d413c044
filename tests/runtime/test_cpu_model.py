"""The native runtime's side of the `Model` contract, and what it says when it is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_models import TYPES, append, back_to, cache_of, kernels, loaded, small_file
from synthetic_model import model_shape

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.drawing import draw_choices
from orthrus_gguf.runtime.protocol import Cache, Draw, Model, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

DemoFile = Callable[..., Path]


@pytest.fixture(scope="module")
def demo(demo_file: DemoFile) -> Iterator[CpuModel]:
    """The demo model in F32 all through."""
    with loaded(demo_file("f32"), cache_type_k="f32", cache_type_v="f32") as model:
        yield model


# --- the contract ---


def test_satisfies_the_protocols(demo: CpuModel) -> None:
    model: Model = demo
    cache: Cache = model.new_cache(8)
    assert (cache.length, cache.capacity) == (0, 8)
    assert kernels().isa in model.description
    assert "F32 weights" in model.description


def test_only_wanted_rows_are_returned(demo: CpuModel) -> None:
    tokens = list(range(50, 80))
    (full,) = demo.logits([ar_segment(demo.new_cache(64), tokens, 0)])
    for wanted in (range(0), range(29, 30), range(3, 17)):
        cache = demo.new_cache(64)
        (rows,) = demo.logits([ar_segment(cache, tokens, 0, wanted=wanted)])
        np.testing.assert_array_equal(rows, full[wanted.start : wanted.stop])
        cache.commit(range(30))
        assert cache.length == 30
        (following,) = demo.logits([ar_segment(cache, [9], 30)])
        assert following.shape == (1, demo.config.n_vocab)


def test_wanted_rows_of_mixed_segments(demo: CpuModel) -> None:
    cache = demo.new_cache(64)
    segments = [
        ar_segment(cache, range(10), 0, wanted=range(4, 6)),
        diffusion_segment(cache, 3, 4095, 8, 10, wanted=range(0)),
        diffusion_segment(cache, 3, 4095, 8, 10, wanted=range(1, 8)),
    ]
    shapes = [rows.shape[0] for rows in demo.logits(segments)]
    assert shapes == [2, 0, 7]


def test_choices_are_drawn_from_the_logits(demo: CpuModel) -> None:
    """Rows of a chain as far as drafts come true, all rows of a block; several passes or one."""
    sampler = Sampler(SamplingSettings(temperature=0.7, seed=3, repeat_penalty=1.3))
    history = list(range(100, 150))
    cache = cache_of(demo, history[:40], 128)
    draw = Draw(sampler, history, detail=True, top=3)
    segments = [
        ar_segment(cache, history[40:], 40, draw=draw),
        diffusion_segment(cache, 7, 4095, 16, 50, draw=replace(draw, ahead=(7,))),
    ]
    logits = demo.logits(segments)
    expected = [draw_choices(s, rows) for s, rows in zip(segments, logits, strict=True)]
    assert [choices.rows for choices in demo.forward(segments)] == expected
    assert expected[0][0] is not None
    assert all(choice is not None and choice.logprobs for choice in expected[1])
    demo._batch_rows, whole = 3, demo._batch_rows
    try:
        assert [choices.rows for choices in demo.forward(segments)] == expected
    finally:
        demo._batch_rows = whole


def test_wanted_rows_need_a_draw(demo: CpuModel) -> None:
    cache = cache_of(demo, range(5), 16)
    with pytest.raises(ValueError, match="how to draw"):
        demo.forward([ar_segment(cache, [1, 2], 5)])
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit([0])
    assert cache.length == 5
    assert len(demo.forward([ar_segment(cache, [1, 2], 5, wanted=range(0))])[0]) == 0


def test_blocks_leave_no_trace(demo: CpuModel) -> None:
    tokens = list(range(100, 130))
    (expected,) = demo.logits([ar_segment(demo.new_cache(64), tokens, 0)])
    cache = demo.new_cache(64)
    rows = []
    for i in range(0, 30, 5):
        (block,) = demo.logits([diffusion_segment(cache, tokens[i], 4095, 16, i)])
        assert cache.length == i
        assert block.shape[0] == 16
        rows.append(append(demo, cache, tokens[i : i + 5]))
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_a_block_at_the_end_of_the_context(demo: CpuModel) -> None:
    cache, roomy = (cache_of(demo, range(20), capacity) for capacity in (20, 64))
    (rows,) = demo.logits([diffusion_segment(cache, 5, 4095, 16, 20)])
    (expected,) = demo.logits([diffusion_segment(roomy, 5, 4095, 16, 20)])
    np.testing.assert_array_equal(rows, expected)


def test_more_blocks_than_one_pass_holds(demo: CpuModel) -> None:
    """20 blocks of 16 rows: several passes, each block as if alone."""
    cache = cache_of(demo, range(30), 64)
    blocks = [diffusion_segment(cache, 5 + i, 4095, 16, 30 - i) for i in range(20)]
    together = demo.logits(blocks)
    for block, rows in zip(blocks, together, strict=True):
        (alone,) = demo.logits([block])
        np.testing.assert_array_equal(rows, alone)


def test_rows_that_are_not_committed_are_forgotten(demo: CpuModel) -> None:
    cache = cache_of(demo, range(10), 64)
    expected = append(demo, cache, [11, 12])
    back_to(cache, 10)
    demo.logits([ar_segment(cache, range(200, 230), 10)])
    np.testing.assert_array_equal(append(demo, cache, [11, 12]), expected)
    back_to(cache, 10)
    demo.logits([ar_segment(cache, [11, 77, 78], 10)])
    cache.commit([0])
    np.testing.assert_array_equal(append(demo, cache, [12])[0], expected[1])
    back_to(cache, 10)
    append(demo, cache, range(200, 230))
    back_to(cache, 10)
    np.testing.assert_array_equal(append(demo, cache, [11, 12]), expected)


def test_the_next_pass_drops_what_is_pending(demo: CpuModel) -> None:
    cache, other = cache_of(demo, range(10), 64), cache_of(demo, range(3), 64)
    demo.logits([ar_segment(cache, [1, 2], 10), ar_segment(other, [5], 3)])
    demo.logits([diffusion_segment(cache, 5, 4095, 16, 10)])
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit([0])
    other.commit([0])
    assert (cache.length, other.length) == (10, 4)


@pytest.mark.parametrize("cache_type_v", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("poison", [np.inf, np.nan, 3e38])
def test_wild_drafts_never_reach_ar_rows(tmp_path: Path, poison: float, cache_type_v: str) -> None:
    """Blocks with infinite keys and values leave those in rows that AR rows must not feel, be they
    of their own sequence or of another."""
    path = small_file(tmp_path, TYPES.F32)
    with ModelFile.open(path) as file, path.open("r+b") as raw:
        for name in ("attn_k_diff", "attn_v_diff", "attn_k_norm_diff"):
            info = file.tensors[f"blk.0.{name}.weight"]
            raw.seek(info.offset)
            raw.write(np.full(info.n_bytes // 4, poison, np.float32).tobytes())
    with loaded(path, cache_type_v=cache_type_v) as model:
        tokens = list(range(40, 60))
        (expected,) = model.logits([ar_segment(model.new_cache(64), tokens, 0)])
        cache, other = (cache_of(model, tokens[:10], 64) for _ in range(2))
        model.logits([diffusion_segment(cache, 5, 319, 16, 10)])
        segments = [
            ar_segment(cache, tokens[10:], 10),
            diffusion_segment(cache, 5, 319, 16, 12),
            ar_segment(other, tokens[10:], 10),
        ]
        found, _, beside = model.logits(segments)
        np.testing.assert_array_equal(found, expected[10:])
        np.testing.assert_array_equal(beside, expected[10:])


def test_interrupted_prompts_leave_the_caches_as_they_were(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(demo_file("f32"), batch_rows=8) as model:
        cache, other = cache_of(model, range(5), 64), cache_of(model, range(3), 64)
        model.logits([ar_segment(other, [1], 3)])
        compute, calls = model._compute, []

        def interrupted(filled: Any, **more: Any) -> None:
            calls.append(filled)
            if len(calls) == 3:
                raise KeyboardInterrupt
            compute(filled, **more)

        monkeypatch.setattr(model, "_compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.logits([ar_segment(other, [1], 3), ar_segment(cache, range(40), 5)])
        assert (cache.length, other.length) == (5, 3)
        for left in (cache, other):
            with pytest.raises(ValueError, match="no AR rows are pending"):
                left.commit([0])


# --- errors ---


def test_tokens_outside_the_vocabulary(demo: CpuModel) -> None:
    for token in (-1, 4096, 1 << 40):
        with pytest.raises(OrthrusError, match=f"token {token} is outside the vocabulary of 4096"):
            demo.logits([ar_segment(demo.new_cache(8), [1, token, 2], 0)])


def test_blocks_need_heads(tmp_path: Path) -> None:
    path = small_file(tmp_path, TYPES.F32, model_shape(block_size=None))
    with loaded(path) as model:
        cache = cache_of(model, [1, 2], 32)
        with pytest.raises(OrthrusError, match="has no diffusion heads"):
            model.logits([diffusion_segment(cache, 1, 2, 4, 2)])


def test_misuse_is_a_value_error(demo: CpuModel, demo_file: DemoFile) -> None:
    cache = demo.new_cache(8)
    with pytest.raises(ValueError, match="has room for 8"):
        demo.logits([ar_segment(cache, range(9), 0)])
    with pytest.raises(ValueError, match="block of 129 rows"):
        demo.logits([diffusion_segment(cache, 1, 2, 129, 0)])
    with pytest.raises(ValueError, match="at least one segment"):
        demo.logits([])
    for tap in (-1, demo.config.n_layers + 2):
        with pytest.raises(ValueError, match=r"taps .* expected 0\.\."):
            demo.forward([ar_segment(cache, [1], 0, wanted=range(0), taps=(tap,))])
    cache.close()
    with pytest.raises(ValueError, match="closed"):
        demo.logits([ar_segment(cache, [1], 0)])
    with loaded(demo_file("f32")) as other, pytest.raises(ValueError, match="another model"):
        other.logits([ar_segment(demo.new_cache(8), [1], 0)])


def test_a_refused_pass_leaves_nothing_pending(demo: CpuModel) -> None:
    cache = cache_of(demo, range(4), 8)
    demo.logits([ar_segment(cache, [1, 2], 4)])
    with pytest.raises(ValueError, match="has room for 8"):
        demo.logits([ar_segment(cache, range(9), 4)])
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit([0])
    assert cache.length == 4


def test_a_closed_model_says_so(demo_file: DemoFile) -> None:
    with loaded(demo_file("f32")) as model:
        cache = model.new_cache(8)
    model.close()
    with pytest.raises(OrthrusError, match="closed"):
        model.logits([ar_segment(cache, [1], 0)])
    with pytest.raises(OrthrusError, match="closed"):
        model.new_cache(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_rows": 0}, "-b 0"),
        ({"cache_type_k": "q5_0"}, "-ctk q5_0: expected one of f32, f16, q8_0, q4_0"),
    ],
)
def test_impossible_settings(demo_file: DemoFile, settings: dict[str, Any], message: str) -> None:
    with ModelFile.open(demo_file("f32")) as file, pytest.raises(OrthrusError, match=message):
        CpuModel.load(file, kernels(), threads=1, **settings)
