"""Every architecture on the reference runtime: against numpy, and against stock llama.cpp.

Random models, so that every part matters: a bias left out or a pair turned wrongly shows at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from numpy_model import NumpyModel

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment, path_to
from orthrus_gguf.runtime.reference import ReferenceModel
from tests.tiny_model import (
    BASES,
    CONTEXT,
    MASK,
    N_EMBD,
    N_LAYERS,
    N_VOCAB,
    SCALINGS,
    write_heads,
    write_model,
)

PROMPT: list[int] = np.random.default_rng(5).integers(4, MASK, 60).tolist()
TREE = (-1, 0, 0, 1, 2, 2)


def load(path: Path, heads: Path | None = None) -> tuple[ReferenceModel, NumpyModel]:
    torch.set_num_threads(1)
    with ModelFile.open(path, heads) as file:
        return ReferenceModel(file), NumpyModel(file)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", BASES)
def test_logits_and_taps_are_numpys(tmp_path: Path, base: str, scaling: str) -> None:
    """AR rows, a block that sees some of them, and a tree; from a base and its heads."""
    tied, n_heads = base != "llama", (4, 1) if base == "llama" else (4, 2)
    path = write_model(tmp_path / "b.gguf", base, tied=tied, n_heads=n_heads, scaling=scaling)
    heads = write_heads(tmp_path / "h.gguf", base=base, n_heads=n_heads, scaling=scaling)
    model, oracle = load(path, heads)
    cache = model.new_cache(CONTEXT)
    model.logits([ar_segment(cache, PROMPT[:30], 0)])
    cache.commit(range(30))
    segments = [
        ar_segment(cache, PROMPT[30:], 30),
        diffusion_segment(cache, 7, MASK, 8, 50),
    ]
    ar, block = model.logits(segments)
    expected = oracle.ar(PROMPT)
    assert np.abs(expected).max() > 1, "not next to nothing"
    np.testing.assert_allclose(ar, expected[30:], rtol=0, atol=2e-5)
    expected = oracle.block(PROMPT[:50], [7, *[MASK] * 7])
    np.testing.assert_allclose(block, expected, rtol=0, atol=2e-5)

    model.logits([ar_segment(cache, PROMPT[30:40], 30)])
    cache.commit(range(10))
    tokens = list(range(20, 26))
    (tree,) = model.logits([ar_segment(cache, tokens, 40, parents=TREE)])
    for row in range(len(TREE)):
        along = [tokens[i] for i in path_to(row, TREE)]
        expected = oracle.ar([*PROMPT[:40], *along])[-1]
        np.testing.assert_allclose(tree[row], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("base", BASES)
def test_taps_are_what_layers_pass_on(tmp_path: Path, base: str) -> None:
    """Of all rows, wanted or not, of AR rows, blocks and trees; in the order asked for."""
    model, oracle = load(write_model(tmp_path / "t.gguf", base=base))
    cache = model.new_cache(CONTEXT)
    taps = (N_LAYERS + 1, 0, N_LAYERS, 1)
    nothing = range(0)
    unasked = diffusion_segment(cache, 7, MASK, 8, 10, wanted=nothing)
    ar, block, silent = model.forward(
        [
            ar_segment(cache, PROMPT[:20], 0, wanted=nothing, taps=taps),
            replace(unasked, taps=taps),
            unasked,
        ]
    )
    assert silent.taps is None
    assert ar.taps is not None
    assert block.taps is not None
    assert ar.taps.dtype == block.taps.dtype == np.float32
    assert ar.taps.shape == (4, 20, N_EMBD)
    states = oracle.ar_states(PROMPT[:20])
    np.testing.assert_allclose(ar.taps, states[list(taps)], rtol=0, atol=2e-5)
    states = oracle.block_states(PROMPT[:10], [7, *[MASK] * 7])
    np.testing.assert_allclose(block.taps, states[list(taps)], rtol=0, atol=2e-5)
    (tree,) = model.forward(
        [ar_segment(cache, [*range(20, 26)], 0, wanted=nothing, parents=TREE, taps=taps)]
    )
    assert tree.taps is not None
    states = oracle.ar_states([20 + row for row in path_to(5, TREE)])
    np.testing.assert_allclose(tree.taps[:, 5], states[list(taps), -1], rtol=0, atol=2e-5)


# --- stock llama.cpp ---

#: llama.cpp reads RoPE's factors in llama files only, and refuses them in others.
STOCK = [(base, one) for base in BASES for one in SCALINGS if base == "llama" or one != "llama3"]


def stock_tokens(path: Path, n: int) -> list[dict[str, Any]]:
    """Greedy tokens after PROMPT with the log probabilities of the whole vocabulary.

    One row per pass, without repacked weights and flash attention: see `test_ggml_stock.py`.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = CONTEXT, 1, 0, False
    params.n_ubatch, params.no_extra_bufts = 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    answer = xllamacpp.Server(params).handle_completions(
        {
            "prompt": PROMPT,
            "n_predict": n,
            "temperature": 0,
            "n_probs": N_VOCAB,
            "cache_prompt": False,
            "ignore_eos": True,
        }
    )
    content: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
    return content


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("base", "scaling"), STOCK)
def test_tokens_and_probabilities_are_stock_llamacpps(
    tmp_path: Path, base: str, scaling: str, tied: bool
) -> None:
    n_heads = (2, 1) if base == "qwen2" else (4, 2)
    path = write_model(tmp_path / "t.gguf", base, tied=tied, n_heads=n_heads, scaling=scaling)
    model, _ = load(path)
    cache, text = model.new_cache(CONTEXT), list(PROMPT)
    entries = stock_tokens(path, 32)
    assert len(entries) == 32
    for entry in entries:
        start = cache.length
        (logits,) = model.logits([ar_segment(cache, text[start:], start)])
        cache.commit(range(len(text) - start))
        assert int(logits[-1].argmax()) == entry["id"]
        logprobs = logits[-1] - np.logaddexp.reduce(logits[-1].astype(np.float64))
        expected = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
        assert len(expected) == N_VOCAB
        found = logprobs[list(expected)]
        np.testing.assert_allclose(found, list(expected.values()), rtol=0, atol=2e-5)
        text.append(entry["id"])
