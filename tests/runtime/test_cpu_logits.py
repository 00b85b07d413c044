"""Logits of the native CPU kernels against the official outputs and against numpy float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ggml_models
import gguf
import numpy as np
import pytest
from cpu_cases import WEIGHTS
from cpu_models import TYPES, loaded, small_file
from numpy_model import NumpyModel
from synthetic_model import model_shape, write_model

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.protocol import Draw, Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

DemoFile = Callable[..., Path]
GREEDY = Sampler(SamplingSettings(temperature=0))

#: llama.cpp allows each quantized product 5e-4 (test-backend-ops); two layers are many in a row.
MAX_NMSE = 2e-3


@pytest.fixture(scope="module")
def demo(demo_file: DemoFile) -> Iterator[CpuModel]:
    """The demo model in F32 all through."""
    with loaded(demo_file("f32"), cache_type_k="f32", cache_type_v="f32") as model:
        yield model


def nmse(found: Any, expected: Any) -> float:
    return float(np.square(found - expected).sum() / np.square(expected).sum())


# --- the official implementation ---


@pytest.mark.parametrize("number", range(3))
def test_logits_equal_the_official_ones(
    demo: CpuModel, golden: dict[str, Any], golden_logits: dict[str, Any], number: int
) -> None:
    case = golden["cases"][number]
    prompt, start = case["prompt_ids"], len(case["prompt_ids"])
    anchor, mask = case["output_ids"][0], demo.config.mask_token
    assert mask is not None
    cache = demo.new_cache(start + 32)
    runs: dict[str, Callable[[], Segment]] = {
        "prefill": lambda: ar_segment(cache, prompt, 0),
        "first_block_diffusion": lambda: diffusion_segment(cache, anchor, mask, 16, start),
        "first_verify": lambda: ar_segment(cache, [anchor, *case["drafts"][0]], start),
    }
    for name, segment in runs.items():
        (logits,) = demo.logits([segment()])
        if name == "prefill":
            cache.commit(range(start))
        expected = golden_logits[f"case{number}_{name}_logits"]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("type_name", ["f32", "f16"])
def test_tokens_equal_the_official_ones(
    demo_file: DemoFile, golden: dict[str, Any], type_name: str
) -> None:
    """Every golden prompt, decoded in two passes per cycle: same tokens, same acceptance."""
    with loaded(demo_file(type_name)) as model:
        for case in golden["cases"]:
            tokens, starts = two_pass(model, case["prompt_ids"], case["n_new"])
            assert tokens == case["output_ids"]
            assert starts == case["cycle_starts"]


def two_pass(model: CpuModel, prompt: list[int], n_new: int) -> tuple[list[int], list[int]]:
    """Greedy tokens after a prompt by drafts of 15, and where each cycle started."""
    mask = model.config.mask_token
    assert mask is not None
    cache, tokens, starts = model.new_cache(len(prompt) + n_new), list(prompt), []
    draw = Draw(GREEDY, tokens)
    last = range(len(prompt) - 1, len(prompt))
    ((first,),) = model.forward([ar_segment(cache, prompt, 0, wanted=last, draw=draw)])
    cache.commit(range(len(prompt)))
    assert first is not None
    tokens.append(first.token)
    while len(tokens) < len(prompt) + n_new:
        start, width = len(tokens) - 1, min(15, len(prompt) + n_new - len(tokens) - 1)
        starts.append(start)
        drafts: list[int] = []
        if width:
            block = diffusion_segment(
                cache, tokens[-1], mask, 16, start, wanted=range(width), draw=draw
            )
            drafts = [choice.token for choice in model.forward([block])[0] if choice is not None]
        assert len(drafts) == width
        (verified,) = model.forward([ar_segment(cache, [tokens[-1], *drafts], start, draw=draw)])
        drawn = [choice.token for choice in verified if choice is not None]
        assert drawn[:-1] == drafts[: len(drawn) - 1], "choices end where drafts are wrong"
        cache.commit(range(len(drawn)))
        tokens += drawn
    return tokens[len(prompt) :], starts


# --- numpy ---


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_numpys(tmp_path: Path, yarn: bool, tied: bool) -> None:
    """F32 all through: AR rows, then two blocks that see different parts of the cache."""
    rope = Rope(10000.0, 4.0, 1024, 1.0) if yarn else Rope(1e6)
    config = model_shape(rope=rope, tied=tied, n_head=6, n_head_kv=2, head_dim=48)
    path = small_file(tmp_path, TYPES.F32, config)
    tokens = np.random.default_rng(3).integers(0, 300, 70).tolist()
    with loaded(path, cache_type_k="f32", cache_type_v="f32") as model:
        oracle = NumpyModel(ModelFile.open(path))
        cache = model.new_cache(128)
        segments = [
            ar_segment(cache, tokens, 0),
            diffusion_segment(cache, 7, 319, 9, 70),
            diffusion_segment(cache, 8, 319, 5, 40),
        ]
        ar, whole, early = model.logits(segments)
        assert nmse(ar, oracle.ar(tokens)) < 1e-10
        assert nmse(whole, oracle.block(tokens, [7] + [319] * 8)) < 1e-10
        assert nmse(early, oracle.block(tokens[:40], [8] + [319] * 4)) < 1e-10


@pytest.mark.parametrize("qtype", [kind.name for kind in WEIGHTS])
@pytest.mark.parametrize("cache_types", [("f16", "f16"), ("q8_0", "q8_0")])
def test_quantized_logits_are_close_to_numpys(
    tmp_path: Path, qtype: str, cache_types: tuple[str, str]
) -> None:
    """The same weights dequantized: what remains is int8 activations and the cache's rounding."""
    path = small_file(tmp_path, gguf.GGMLQuantizationType[qtype])
    tokens = np.random.default_rng(4).integers(0, 300, 40).tolist()
    with loaded(path, cache_type_k=cache_types[0], cache_type_v=cache_types[1]) as model:
        oracle = NumpyModel(ModelFile.open(path))
        cache = model.new_cache(64)
        segments = [ar_segment(cache, tokens, 0), diffusion_segment(cache, 7, 319, 9, 40)]
        ar, block = model.logits(segments)
        assert nmse(ar, oracle.ar(tokens)) < MAX_NMSE
        assert nmse(block, oracle.block(tokens, [7] + [319] * 8)) < MAX_NMSE


@pytest.mark.parametrize("k", CACHE_TYPES)
@pytest.mark.parametrize("v", CACHE_TYPES)
def test_caches_hold_the_numbers_of_ggmls(tmp_path: Path, k: str, v: str) -> None:
    """What remains between the two: ggml rounds queries and weights to the cache's type as well."""
    path = small_file(tmp_path, TYPES.F32)
    tokens = np.random.default_rng(4).integers(0, 300, 90).tolist()
    found = []
    for load in (loaded, ggml_models.loaded):
        with load(path, cache_type_k=k, cache_type_v=v) as model:
            cache = model.new_cache(128)
            segments = [ar_segment(cache, tokens, 0), diffusion_segment(cache, 7, 319, 9, 80)]
            found.append(model.logits(segments))
    most = {"f32": 1e-6, "f16": 1e-6, "q8_0": 3e-4, "q4_0": 5e-4}
    for ours, theirs in zip(*found, strict=True):
        assert nmse(ours, theirs) < most[k] + 2e-5 * (v == "q4_0")


def test_small_files_of_every_sort_of_block(tmp_path: Path) -> None:
    """Matrices of types that take activations in different forms, gate and up among them."""

    def rule(name: str) -> gguf.GGMLQuantizationType:
        known = {"ffn_gate": TYPES.Q4_K, "ffn_up": TYPES.Q8_0, "attn_v": TYPES.Q6_K}
        known |= {"attn_k": TYPES.F32, "attn_q": TYPES.Q5_1}
        return known.get(name.removeprefix("blk.0.").removesuffix(".weight"), TYPES.F16)

    path = tmp_path / "mixed.gguf"
    write_model(load_library().api, path, model_shape(), rule)
    tokens = np.random.default_rng(4).integers(0, 300, 40).tolist()
    with loaded(path) as model:
        oracle = NumpyModel(ModelFile.open(path))
        (ar,) = model.logits([ar_segment(model.new_cache(64), tokens, 0)])
        assert nmse(ar, oracle.ar(tokens)) < MAX_NMSE
