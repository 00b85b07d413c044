"""Logits of the ggml runtime against the official outputs and against numpy float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from ggml_models import TYPES, loaded, small_file
from numpy_model import NumpyModel
from synthetic_model import model_shape

from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.protocol import Draw, Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

DemoFile = Callable[..., Path]
GREEDY = Sampler(SamplingSettings(temperature=0))

#: llama.cpp allows each quantized product 5e-4 (test-backend-ops); two layers are many in a row.
MAX_NMSE = 2e-3


@pytest.fixture(scope="module")
def demo(demo_file: DemoFile) -> Iterator[GgmlModel]:
    """The demo model in F32 all through."""
    with loaded(demo_file("f32"), cache_type_k="f32", cache_type_v="f32") as model:
        yield model


def nmse(found: Any, expected: Any) -> float:
    return float(np.square(found - expected).sum() / np.square(expected).sum())


# --- the official implementation ---


@pytest.mark.parametrize("number", range(3))
def test_logits_equal_the_official_ones(
    demo: GgmlModel, golden: dict[str, Any], golden_logits: dict[str, Any], number: int
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


def two_pass(model: GgmlModel, prompt: list[int], n_new: int) -> tuple[list[int], list[int]]:
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


@pytest.mark.parametrize("qtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
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


def test_norms_of_other_types_and_files_of_small_alignment(tmp_path: Path) -> None:
    """What ggml would not take as it lies is copied, with the same result to the bit."""
    source = small_file(tmp_path, TYPES.Q8_0)
    plain = tmp_path / "plain.gguf"
    rewrite(source, plain, norm_type=np.float32)
    with loaded(plain) as model:
        assert model._weights.copied_bytes == 0
        (expected,) = model.logits([ar_segment(model.new_cache(32), range(20), 0)])
    fully_copied = []
    for padding in (8, 16, 24, 32):  # one of the four happens to be aligned to 32
        other = tmp_path / f"other-{padding}.gguf"
        rewrite(source, other, norm_type=np.float16, alignment=8, padding=padding)
        with loaded(other) as model:
            fully_copied.append(model._weights.copied_bytes > 100_000)
            (found,) = model.logits([ar_segment(model.new_cache(32), range(20), 0)])
            np.testing.assert_array_equal(found, expected)
    assert sum(fully_copied) == 3


def rewrite(
    source: Path,
    target: Path,
    *,
    norm_type: type[np.floating[Any]],
    alignment: int = 32,
    padding: int = 8,
) -> None:
    """The same model, its norms rounded to F16 and stored as `norm_type`, aligned differently."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "orthrus")
    writer.add_custom_alignment(alignment)
    writer.add_description("x" * padding)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, *rest = field.types
            sub_type = rest[0] if rest else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data.astype(np.float16).astype(norm_type))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
