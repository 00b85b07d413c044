"""ModelConfig.from_metadata: what it takes from the keys, and every contradiction it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import ARCHITECTURES
from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.model.tensors import base_tensors, diffusion_tensors, is_diffusion_tensor

PATH = Path("models/some-model.gguf")

QWEN3: dict[str, Any] = {
    "general.architecture": "qwen3",
    "qwen3.block_count": 3,
    "qwen3.context_length": 40960,
    "qwen3.embedding_length": 64,
    "qwen3.feed_forward_length": 96,
    "qwen3.attention.head_count": 6,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.attention.key_length": 32,
    "qwen3.attention.value_length": 32,
    "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3.rope.freq_base": 1e6,
}
ORTHRUS: dict[str, Any] = {
    **{key.replace("qwen3.", "orthrus."): value for key, value in QWEN3.items()},
    "general.architecture": "orthrus",
    "orthrus.diffusion.block_size": 32,
    "tokenizer.ggml.mask_token_id": 99,
}
YARN: dict[str, Any] = {
    "orthrus.rope.scaling.type": "yarn",
    "orthrus.rope.scaling.factor": 4.0,
    "orthrus.rope.scaling.original_context_length": 32768,
}


def config(
    metadata: Mapping[str, Any], changes: Mapping[str, Any] | None = None, *, n_vocab: int = 100
) -> ModelConfig:
    """The config of `metadata` with `changes`; a value of None removes the key."""
    merged = {k: v for k, v in {**metadata, **(changes or {})}.items() if v is not None}
    return ModelConfig.from_metadata(
        merged,
        path=PATH,
        n_vocab=n_vocab,
        tied=True,
        has_heads=merged.get("general.architecture") == "orthrus",
    )


def refusal(metadata: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The message for `metadata` with `changes`."""
    with pytest.raises(OrthrusError) as caught:
        config(metadata, changes)
    message = str(caught.value)
    assert message.startswith(f"{PATH}: ")
    assert "\n" not in message
    assert "; " in message, "says what to do"
    return message


def test_orthrus() -> None:
    assert config(ORTHRUS, {"general.name": "Orthrus Tiny"}) == ModelConfig(
        name="Orthrus Tiny",
        n_layers=3,
        n_ctx_train=40960,
        n_embd=64,
        n_ff=96,
        n_head=6,
        n_head_kv=2,
        head_dim=32,
        n_vocab=100,
        rms_eps=1e-6,
        rope=Rope(1e6),
        tied=True,
        block_size=32,
        mask_token=99,
    )


def test_qwen3_has_no_heads() -> None:
    plain = config(QWEN3)
    assert plain.block_size is None
    assert plain.mask_token is None
    assert not plain.has_heads
    assert config(ORTHRUS).has_heads


def test_name_falls_back_to_the_file() -> None:
    assert config(QWEN3).name == "some-model"
    assert config(QWEN3, {"general.name": ""}).name == "some-model"


OPTIONAL = ("head_count_kv", "key_length", "value_length")


@pytest.mark.parametrize("key", [key for key in ORTHRUS if not key.endswith(OPTIONAL)])
def test_required_key_missing(key: str) -> None:
    assert f"metadata key {key}: is missing" in refusal(ORTHRUS, {key: None})


def test_defaults_of_the_format() -> None:
    """Keys that the format makes optional: as many KV heads as heads, width / heads per head."""
    removed = {
        "orthrus.attention.head_count_kv": None,
        "orthrus.attention.key_length": None,
        "orthrus.attention.value_length": None,
        "orthrus.attention.head_count": 4,
    }
    found = config(ORTHRUS, removed)
    assert (found.n_head, found.n_head_kv, found.head_dim) == (4, 4, 16)


@pytest.mark.parametrize("key", list(ORTHRUS))
@pytest.mark.parametrize("value", [True, [], np.zeros(2, np.bool_)], ids=["bool", "list", "array"])
def test_wrong_type(key: str, value: Any) -> None:
    assert f"metadata key {key}: expected " in refusal(ORTHRUS, {key: value})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("orthrus.block_count", 0, "expected 1 to 1024, found 0"),
        ("orthrus.block_count", 1025, "expected 1 to 1024, found 1025"),
        ("orthrus.block_count", -1, "found -1"),
        ("orthrus.block_count", 3.0, "expected an integer, found 3.0"),
        ("orthrus.block_count", "3", "expected an integer, found '3'"),
        ("orthrus.context_length", 0, "found 0"),
        ("orthrus.context_length", 1 << 40, "found 1099511627776"),
        ("orthrus.embedding_length", 0, "found 0"),
        ("orthrus.embedding_length", 1 << 32, "found 4294967296"),
        ("orthrus.feed_forward_length", 0, "found 0"),
        ("orthrus.attention.head_count", 0, "found 0"),
        ("orthrus.attention.head_count_kv", 0, "expected 1 to 6, found 0"),
        ("orthrus.attention.head_count_kv", 7, "expected 1 to 6, found 7"),
        ("orthrus.attention.head_count_kv", 4, "expected a divisor of the 6 heads, found 4"),
        ("orthrus.attention.key_length", 33, "expected an even number, found 33"),
        ("orthrus.attention.key_length", 1026, "expected 2 to 1024, found 1026"),
        ("orthrus.attention.key_length", 0, "expected 2 to 1024, found 0"),
        ("orthrus.attention.value_length", 64, "expected 32 as in orthrus.attention.key_length"),
        ("orthrus.rope.dimension_count", 16, "expected 32 as in orthrus.attention.key_length"),
        ("orthrus.attention.layer_norm_rms_epsilon", 0.0, "above 0, found 0.0"),
        ("orthrus.attention.layer_norm_rms_epsilon", float("nan"), "found nan"),
        ("orthrus.attention.layer_norm_rms_epsilon", 1, "expected a float, found 1"),
        ("orthrus.rope.freq_base", -1.0, "above 0, found -1.0"),
        ("orthrus.rope.freq_base", float("inf"), "found inf"),
        ("orthrus.diffusion.block_size", 1, "expected 2 to 1024, found 1"),
        ("orthrus.diffusion.block_size", 1025, "expected 2 to 1024, found 1025"),
        ("tokenizer.ggml.mask_token_id", 100, "expected 0 to 99, found 100"),
        ("tokenizer.ggml.tokens", ["a"] * 99, "expected 100 tokens .* found 99"),
        ("tokenizer.ggml.tokens", np.zeros(100), "array of strings, found an array of 100 float64"),
        ("tokenizer.ggml.tokens", "abc", "array of strings, found 'abc'"),
        ("tokenizer.ggml.merges", np.zeros(3, np.int32), "array of strings, found an array of 3"),
        ("tokenizer.ggml.token_type", np.ones(99, np.int32), "expected 100 elements, found 99"),
        ("tokenizer.ggml.token_type", np.ones(100, np.float32), "expected an array of integers"),
        ("tokenizer.ggml.token_type", ["1"] * 100, "expected an array of integers"),
        ("tokenizer.ggml.scores", np.ones(100, np.int32), "expected an array of floats"),
        ("orthrus.attention.sliding_window", 4096, "4096 is not supported"),
        ("orthrus.attention.causal", False, "False is not supported"),
        ("orthrus.expert_count", 8, "8 is not supported; models that use it cannot run here"),
        ("orthrus.rope.scale_linear", 0.5, "expected at least 1, found 0.5"),
        ("orthrus.base_architecture", "gemma", "expected one of 'qwen3', .* found 'gemma'; heads"),
        ("orthrus.base_architecture", "orthrus", "found 'orthrus'"),
    ],
)
def test_out_of_range_or_contradictory(key: str, value: Any, expected: str) -> None:
    message = refusal(ORTHRUS, {key: value})
    assert f"metadata key {key}: " in message
    assert re.search(expected, message)


def test_harmless_extras() -> None:
    extras = {
        "orthrus.rope.dimension_count": 32,
        "orthrus.attention.sliding_window": 0,
        "orthrus.attention.causal": True,
        "orthrus.expert_count": 0,
        "orthrus.rope.scale_linear": 1.0,
        "orthrus.base_architecture": "qwen3",
        "orthrus.something.new": 7,
        "tokenizer.ggml.scores": np.zeros(100, np.float32),
        "orthrus.attention.head_count_kv": np.full(3, 2, np.int32),
        "orthrus.feed_forward_length": np.full(3, 96, np.uint32),
    }
    assert config(ORTHRUS, extras) == config(ORTHRUS)


def test_layers_that_differ() -> None:
    key = "orthrus.attention.head_count_kv"
    message = refusal(ORTHRUS, {key: np.array([2, 2, 3], np.int32)})
    assert f"{key}: differs between layers, which is not supported" in message
    assert "expected an integer" in refusal(ORTHRUS, {key: np.array([], np.int32)})
    assert "expected an integer" in refusal(ORTHRUS, {key: np.array([2.0, 2.0])})


def test_unknown_architecture() -> None:
    message = refusal(ORTHRUS, {"general.architecture": "gemma3"})
    known = "'orthrus' or one of 'qwen3', 'qwen2', 'llama', 'qwen35'"
    assert f"expected {known}, found 'gemma3'; models of other architectures" in message


def test_long_values_are_cut_in_messages() -> None:
    assert len(refusal(ORTHRUS, {"general.architecture": "x" * 100_000})) < 400


@pytest.mark.parametrize("n_vocab", [0, (1 << 24) + 1])
def test_vocabulary_size(n_vocab: int) -> None:
    with pytest.raises(OrthrusError, match=f"found {n_vocab} rows in token_embd.weight"):
        config(QWEN3, n_vocab=n_vocab)


def test_yarn_with_defaults() -> None:
    assert config(ORTHRUS, YARN).rope == Rope(
        1e6,
        factor=4.0,
        original_context=32768,
        ext_factor=1.0,
        attn_factor=1.0,
        beta_fast=32.0,
        beta_slow=1.0,
    )


def test_yarn_keys_that_llama_cpp_does_not_read() -> None:
    """Of ours; the magnitude's own key it does read."""
    settings = {
        "orthrus.rope.scaling.attn_factor": 0.75,
        "orthrus.rope.scaling.yarn_ext_factor": 0.25,
        "orthrus.rope.scaling.yarn_attn_factor": 1.5,
        "orthrus.rope.scaling.yarn_beta_fast": 16.0,
        "orthrus.rope.scaling.yarn_beta_slow": 2.0,
    }
    assert config(ORTHRUS, {**YARN, **settings}).rope == Rope(
        1e6,
        factor=4.0,
        original_context=32768,
        ext_factor=1.0,
        attn_factor=0.75,
        beta_fast=32.0,
        beta_slow=1.0,
    )


def test_yarn_details() -> None:
    no_original = {"orthrus.rope.scaling.original_context_length": None}
    assert config(ORTHRUS, {**YARN, **no_original}).rope.original_context == 40960


@pytest.mark.parametrize(
    "scaling",
    [
        {"scaling.type": "linear", "scaling.factor": 4.0},
        {"scaling.factor": 4.0},
        {"scale_linear": 4.0},
        {"scale_linear": 9.0, "scaling.factor": 4.0},
    ],
)
def test_linear_scaling(scaling: Mapping[str, Any]) -> None:
    """Under its new name or, where that is absent, under its old one."""
    settings = {f"orthrus.rope.{key}": value for key, value in scaling.items()}
    assert config(ORTHRUS, settings).rope == Rope(1e6, factor=4.0)


def test_magnitude_without_yarn() -> None:
    """As in llama.cpp, which does not ask for a kind of scaling."""
    magnitude = {"orthrus.rope.scaling.attn_factor": 1.25}
    assert config(ORTHRUS, magnitude).rope == Rope(1e6, attn_factor=1.25)
    linear = {"orthrus.rope.scaling.type": "linear", "orthrus.rope.scaling.factor": 2.0}
    assert config(ORTHRUS, magnitude | linear).rope == Rope(1e6, factor=2.0, attn_factor=1.25)


@pytest.mark.parametrize(
    "scaling",
    [
        {"orthrus.rope.scaling.type": "none"},
        {"orthrus.rope.scaling.type": "none", "orthrus.rope.scaling.factor": 8.0},
        {"orthrus.rope.scaling.factor": 1.0},
        {"orthrus.rope.scaling.factor": 0.0},
        {"orthrus.rope.scaling.type": "linear", "orthrus.rope.scaling.factor": 1.0},
    ],
)
def test_no_scaling(scaling: Mapping[str, Any]) -> None:
    assert config(ORTHRUS, scaling).rope == Rope(1e6)


@pytest.mark.parametrize(
    ("scaling", "key", "expected"),
    [
        ({"type": "linear", "factor": 0.5}, "factor", "expected at least 1, found 0.5"),
        ({"factor": -2.0}, "factor", "expected at least 1, found -2.0"),
        ({"factor": 2.0, "attn_factor": 0.0}, "attn_factor", "above 0, found 0.0"),
        ({"type": "longrope"}, "type", "found 'longrope'; this RoPE scaling is not supported"),
        ({"type": "llama3"}, "type", "expected 'yarn', 'linear' or 'none', found 'llama3'"),
        ({"type": 1}, "type", "expected a string, found 1"),
        ({"type": "yarn", "factor": 0.5}, "factor", "expected at least 1, found 0.5"),
        ({"type": "yarn", "factor": float("nan")}, "factor", "found nan"),
        ({"type": "yarn", "factor": 4}, "factor", "expected a float, found 4"),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 0},
            "original_context_length",
            "found 0",
        ),
        ({"type": "yarn", "attn_factor": 1e30}, "attn_factor", "found 1e+30"),
    ],
)
def test_scaling_refused(scaling: Mapping[str, Any], key: str, expected: str) -> None:
    message = refusal(ORTHRUS, {f"orthrus.rope.scaling.{k}": v for k, v in scaling.items()})
    assert f"metadata key orthrus.rope.scaling.{key}: " in message
    assert expected in message


def test_yarn_needs_frequencies_that_fall() -> None:
    message = refusal(ORTHRUS, {**YARN, "orthrus.rope.freq_base": 1.0})
    assert "orthrus.rope.freq_base: expected a number above 1 with YaRN, found 1.0" in message


def of_architecture(name: str) -> dict[str, Any]:
    return {
        **{key.replace("qwen3.", f"{name}."): value for key, value in QWEN3.items()},
        "general.architecture": name,
    }


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if not a.hybrid])
def test_architectures(name: str) -> None:
    """A stock file says it in general.architecture, one with heads beside `orthrus`."""
    plain = config(of_architecture(name))
    assert plain.architecture is ARCHITECTURES[name]
    assert not plain.has_heads
    with_heads = config(ORTHRUS, {"orthrus.base_architecture": name})
    assert with_heads.architecture is ARCHITECTURES[name]
    assert with_heads.has_heads
    assert config(ORTHRUS).architecture is ARCHITECTURES["qwen3"]


def test_what_old_llama_files_leave_out() -> None:
    """The RoPE base of Llama 1 and 2; other architectures must name theirs."""
    found = config(of_architecture("llama"), {"llama.rope.freq_base": None})
    assert found.rope == Rope(10_000.0)
    for name in ("qwen2", "qwen3"):
        key = f"{name}.rope.freq_base"
        assert f"{key}: is missing" in refusal(of_architecture(name), {key: None})


def test_what_sets_the_architectures_apart() -> None:
    """The tensors of a layer, written out."""
    common = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"}
    common |= {"ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}
    weights = {f"{name}.weight" for name in common}
    more = {
        "qwen3": {"attn_q_norm.weight", "attn_k_norm.weight"},
        "qwen2": {"attn_q.bias", "attn_k.bias", "attn_v.bias"},
        "llama": set(),
    }
    assert set(more) == {name for name, arch in ARCHITECTURES.items() if not arch.hybrid}
    attention = {f"attn_{name}.weight" for name in ("q", "k", "v", "output")}
    for name, own in more.items():
        found = config(ORTHRUS, {"orthrus.base_architecture": name})
        base, twins = base_tensors(found), diffusion_tensors(found)
        assert {key.split(".", 2)[2] for key in base if key.startswith("blk.1.")} == weights | own
        expected = {part.replace(".", "_diff.") for part in attention | own}
        assert {key.split(".", 2)[2] for key in twins if key.startswith("blk.2.")} == expected
        assert all(map(is_diffusion_tensor, twins))
        assert not any(map(is_diffusion_tensor, base))
    biased = config(ORTHRUS, {"orthrus.base_architecture": "qwen2"})
    assert base_tensors(biased)["blk.0.attn_q.bias"] == (192,)
    assert diffusion_tensors(biased)["blk.0.attn_v_diff.bias"] == (64,)
    factors = replace(biased, rope=Rope(1e6, freq_factors=(1.0,) * 16))
    assert next(iter(base_tensors(factors).items())) == ("rope_freqs.weight", (16,))
    assert base_tensors(factors).keys() - base_tensors(biased).keys() == {"rope_freqs.weight"}


@pytest.mark.parametrize(
    ("n_layers", "tied", "count"), [(28, True, 478), (36, True, 614), (36, False, 615)]
)
def test_tensor_counts_of_the_released_models(n_layers: int, tied: bool, count: int) -> None:
    model = ModelConfig.from_metadata(
        {**ORTHRUS, "orthrus.block_count": n_layers},
        path=PATH,
        n_vocab=100,
        tied=tied,
        has_heads=True,
    )
    assert len(base_tensors(model)) + len(diffusion_tensors(model)) == count


def test_tensor_shapes() -> None:
    """Rows first; the twins have the shapes of what they stand in for."""
    base, twins = base_tensors(config(ORTHRUS)), diffusion_tensors(config(ORTHRUS))
    assert base["token_embd.weight"] == (100, 64)
    assert base["blk.2.attn_q.weight"] == twins["blk.2.attn_q_diff.weight"] == (192, 64)
    assert base["blk.2.attn_k.weight"] == twins["blk.2.attn_k_diff.weight"] == (64, 64)
    assert base["blk.2.attn_output.weight"] == twins["blk.2.attn_output_diff.weight"] == (64, 192)
    assert base["blk.2.attn_k_norm.weight"] == twins["blk.2.attn_k_norm_diff.weight"] == (32,)
    assert base["blk.2.ffn_gate.weight"] == (96, 64)
    assert base["blk.2.ffn_down.weight"] == (64, 96)
    assert "output.weight" not in base
    assert not base.keys() & twins.keys()
