"""Every architecture on the native kernels: against numpy, stock llama.cpp, and itself by rows.

Random models, so that every part matters: a bias left out or a pair turned wrongly shows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cpu_models import append, back_to, kernels
from numpy_model import NumpyModel
from stock import Stock

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.protocol import (
    Segment,
    View,
    ar_segment,
    diffusion_segment,
    path_to,
)
from tests.tiny_model import BASES, CONTEXT, MASK, N_VOCAB, SCALINGS, write_heads, write_model

PROMPT: list[int] = np.random.default_rng(5).integers(4, MASK, 60).tolist()
TREE = (-1, 0, 0, 1, 2, 2)


@contextmanager
def loaded(path: Path, heads: Path | None = None) -> Iterator[tuple[CpuModel, NumpyModel]]:
    with (
        ModelFile.open(path, heads) as file,
        CpuModel.load(file, kernels(), threads=1, cache_type_k="f32", cache_type_v="f32") as model,
    ):
        yield model, NumpyModel(file)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", BASES)
def test_logits_and_taps_are_numpys(tmp_path: Path, base: str, scaling: str) -> None:
    """AR rows, a block that sees some of them, and a tree; from a base and its heads."""
    tied, n_heads = base != "llama", (4, 1) if base == "llama" else (4, 2)
    path = write_model(tmp_path / "b.gguf", base, tied=tied, n_heads=n_heads, scaling=scaling)
    heads = write_heads(tmp_path / "h.gguf", base=base, n_heads=n_heads, scaling=scaling)
    with loaded(path, heads) as (model, oracle):
        cache = model.new_cache(CONTEXT)
        append(model, cache, PROMPT[:30])
        block = diffusion_segment(cache, 7, MASK, 8, 50)
        ar, draft = model.logits([ar_segment(cache, PROMPT[30:], 30), block])
        expected = oracle.ar(PROMPT)
        assert np.abs(expected).max() > 1, "not next to nothing"
        np.testing.assert_allclose(ar, expected[30:], rtol=0, atol=5e-5)
        context, rows = PROMPT[:50], [7, *[MASK] * 7]
        np.testing.assert_allclose(draft, oracle.block(context, rows), rtol=0, atol=5e-5)

        taps = tuple(range(model.config.n_layers + 2))
        back_to(cache, 30)
        segments = [
            ar_segment(cache, PROMPT[30:], 30, wanted=range(0), taps=taps),
            Segment(cache, View.DIFFUSION, block.tokens, 50, range(0), taps=taps),
        ]
        states = oracle.ar_states(PROMPT)[:, 30:], oracle.block_states(context, rows)
        for choices, expected in zip(model.forward(segments), states, strict=True):
            assert choices.taps is not None
            np.testing.assert_allclose(choices.taps, expected, rtol=0, atol=5e-5)

        tokens = list(range(20, 26))
        (tree,) = model.logits([ar_segment(cache, tokens, 30, parents=TREE)])
        for row in range(len(TREE)):
            along = [tokens[i] for i in path_to(row, TREE)]
            expected = oracle.ar([*PROMPT[:30], *along])[-1]
            np.testing.assert_allclose(tree[row], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("base", BASES)
def test_rows_are_invariant(tmp_path: Path, base: str) -> None:
    """Whatever shares the pass: other rows, blocks, branches, another sequence."""
    path = write_model(tmp_path / "t.gguf", base=base, scaling="llama3")
    with loaded(path) as (model, _):
        one, many, other = (model.new_cache(CONTEXT) for _ in range(3))
        alone = np.concatenate([append(model, one, [token]) for token in PROMPT])
        for start in range(0, 60, 12):
            company = [
                ar_segment(other, PROMPT[:7], other.length),
                diffusion_segment(many, 7, MASK, 8, start + 3),
            ]
            together = append(model, many, PROMPT[start : start + 12], *company)
            other.commit(range(5))
            np.testing.assert_array_equal(together, alone[start : start + 12])
        back_to(many, 40)
        parents = (-1, 0, 1, 0, 3, 4)
        tokens = [*PROMPT[40:43], 8, 9, 10]
        (tree,) = model.logits([ar_segment(many, tokens, 40, parents=parents)])
        np.testing.assert_array_equal(tree[:3], alone[40:43])
        many.commit([0, 1, 2])
        np.testing.assert_array_equal(append(model, many, PROMPT[43:]), alone[43:])


#: llama.cpp reads RoPE's factors in llama files only, and refuses them in others.
STOCK = [(base, one) for base in BASES for one in SCALINGS if base == "llama" or one != "llama3"]


@pytest.mark.parametrize(("base", "scaling"), STOCK)
def test_tokens_and_probabilities_are_stock_llamacpps(
    tmp_path: Path, base: str, scaling: str
) -> None:
    n_heads = (2, 1) if base == "qwen2" else (4, 2)
    path = write_model(tmp_path / "t.gguf", base, tied=False, n_heads=n_heads, scaling=scaling)
    with loaded(path) as (model, _):
        cache, behind = model.new_cache(CONTEXT), PROMPT
        entries = Stock(path, "f32", CONTEXT).greedy(PROMPT, 32, N_VOCAB, ignore_eos=True)
        assert len(entries) == 32
        for entry in entries:
            logits = append(model, cache, behind)[-1]
            assert int(logits.argmax()) == entry["id"]
            logprobs = logits - np.logaddexp.reduce(logits.astype(np.float64))
            expected = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
            assert len(expected) == N_VOCAB
            found = logprobs[list(expected)]
            np.testing.assert_allclose(found, list(expected.values()), rtol=0, atol=2e-5)
            behind = [entry["id"]]
