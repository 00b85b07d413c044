"""What rows attend to, on the native kernels: the reference runtime's, and exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cpu_models import loaded
from hf_hybrid import TEXT, weights, write_hybrid
from numpy.typing import NDArray
from orthrus_converters.cli import main

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.attention import Attentive, attention_layers
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.protocol import ar_segment
from orthrus_gguf.runtime.reference import ReferenceModel

DemoFile = Callable[..., Path]
PROMPT: list[int] = np.random.default_rng(2).integers(0, 4000, 90).tolist()


def attention(
    model: CpuModel | ReferenceModel,
    rows: int,
    layers: tuple[int, ...],
    cuts: tuple[int, ...] = (),
    tokens: list[int] = PROMPT,
) -> NDArray[np.float32]:
    """Of the last rows of the prompt, which runs in pieces."""
    cache, start = model.new_cache(len(tokens)), 0
    for stop in cuts:
        model.attention(ar_segment(cache, tokens[start:stop], start, wanted=range(0)), layers)
        cache.commit(range(stop - start))
        start = stop
    left = len(tokens) - start
    wanted = range(left - rows, left)
    return model.attention(ar_segment(cache, tokens[start:], start, wanted=wanted), layers)


@pytest.mark.parametrize("types", ["f32", "q8_0"])
def test_it_is_the_reference_runtimes(demo_file: DemoFile, types: str) -> None:
    """In all layers and in some, whatever the cache's types."""
    with (
        loaded(demo_file("f32"), cache_type_k=types, cache_type_v=types) as ours,
        ModelFile.open(demo_file("f32")) as file,
    ):
        theirs = ReferenceModel(file)
        assert isinstance(ours, Attentive)
        assert isinstance(theirs, Attentive)
        for layers in ((0,), tuple(range(ours.config.n_layers))):
            found, expected = attention(ours, 9, layers), attention(theirs, 9, layers)
            assert found.shape == expected.shape == (9, len(PROMPT))
            assert expected.max() > 0.05
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=3e-2 if types[0] == "q" else 2e-3
            )
            for row, weights in enumerate(found):
                last = len(PROMPT) - 9 + row
                assert weights[last] > 0
                assert not weights[last + 1 :].any()


def test_its_bits_depend_on_nothing_but_the_text(demo_file: DemoFile) -> None:
    """Neither on how the prompt is cut, nor on the rows asked about, nor on threads."""
    with loaded(demo_file("q4_0")) as model:
        layers = tuple(range(model.config.n_layers))
        whole = attention(model, 16, layers)
        np.testing.assert_array_equal(attention(model, 16, layers, (40, 71)), whole)
        np.testing.assert_array_equal(attention(model, 5, layers, (1,)), whole[-5:])
        model.use_threads(1)
        np.testing.assert_array_equal(attention(model, 16, layers), whole)


def test_weights_of_one_head_of_one_layer_sum_up_to_one(demo_file: DemoFile) -> None:
    """The largest of heads is at least their mean: a row sums to 1 .. the number of heads."""
    with loaded(demo_file("f32")) as model:
        sums = attention(model, 20, (1,)).sum(axis=1)
        assert (sums >= 1 - 1e-5).all()
        assert (sums <= model.config.n_head).all()


def test_what_cannot_be_asked(demo_file: DemoFile) -> None:
    with loaded(demo_file("q4_0")) as model:
        cache = model.new_cache(256)
        chain = ar_segment(cache, PROMPT, 0, wanted=range(80, 90))
        for layers in ((), (model.config.n_layers,), (-1,)):
            with pytest.raises(ValueError, match="attention of layers"):
                model.attention(chain, layers)
        with pytest.raises(ValueError, match="the last ones"):
            model.attention(ar_segment(cache, PROMPT, 0, wanted=range(5)), (0,))
        with pytest.raises(ValueError, match="up to 64 rows"):
            model.attention(ar_segment(cache, PROMPT, 0), (0,))
        tree = ar_segment(cache, PROMPT[:3], 0, parents=(-1, 0, 0))
        with pytest.raises(ValueError, match="chains"):
            model.attention(tree, (0,))


def test_of_a_hybrid(tmp_path: Path) -> None:
    """Of its layers with attention; DeltaNet layers before them run."""
    path, tokens = tmp_path / "hybrid.gguf", [token % 256 for token in PROMPT]
    source = write_hybrid(tmp_path / "hybrid", TEXT, weights())
    assert main([str(source), str(path), "--type", "f32"]) == 0
    with (
        loaded(path, cache_type_k="f32", cache_type_v="f32") as ours,
        ModelFile.open(path) as file,
    ):
        layers = tuple(attention_layers(ours.config))
        found = attention(ours, 9, layers, (30,), tokens)
        expected = attention(ReferenceModel(file), 9, layers, (), tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
        with pytest.raises(ValueError, match="attention of layers"):
            attention(ours, 9, (0,), (), tokens)


def test_rows_far_into_a_text_attend_sparsely(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To all there is where so many blocks may be taken: the same bits. To fewer: others, the
    same every time; rows that are asked about attend to everything in either case."""
    tokens: list[int] = np.random.default_rng(3).integers(0, 4000, 1200).tolist()
    with loaded(demo_file("q4_0")) as model:
        layers = tuple(range(model.config.n_layers))
        exact = attention(model, 16, layers, (), tokens)
        monkeypatch.setattr("orthrus_gguf.runtime.cpu.model.EXACT", 64)
        np.testing.assert_array_equal(attention(model, 16, layers, (), tokens), exact)
        monkeypatch.setattr("orthrus_gguf.runtime.cpu.model.BLOCKS", 1)
        sparse = attention(model, 16, layers, (), tokens)
        model.use_threads(1)
        np.testing.assert_array_equal(attention(model, 16, layers, (), tokens), sparse)
        assert np.abs(sparse - exact).max() > 0
        assert (sparse > 0).sum() == (exact > 0).sum()
