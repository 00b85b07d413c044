"""Whatever is wrong with config or weights: one clear line, exit code 1, and no file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import (
    Damage,
    check_refusal,
    config,
    header,
    llama3,
    remove,
    resize,
    text,
    weights,
    yarn,
)
from hf_checkpoint import CONFIG, shapes, write_checkpoint, write_json
from orthrus_converters import cli

from orthrus_gguf.gguf import writer

Q = "model.layers.0.self_attn.q_proj.weight"
DIFF = "model.layers.1.self_attn.v_proj_diff.weight"


def drop_heads(values: dict[str, Any]) -> None:
    for name in [name for name in values if "_diff" in name]:
        del values[name]


def poison(value: float) -> Callable[[dict[str, Any]], object]:
    return lambda values: values[Q].__setitem__((1, 2), value)


CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # config.json
    "no config": (remove("config.json"), ("config.json: no such file",)),
    "config is no JSON": (text("config.json", "{"), ("config.json: is not valid JSON",)),
    "config is no UTF-8": (text("config.json", b"\xff{}"), ("config.json: is not valid JSON",)),
    "config is a list": (text("config.json", "[]"), ("expected a JSON object",)),
    "config nests deeply": (text("config.json", "[" * 200_000), ("is not valid JSON",)),
    "config is an LFS pointer": (
        text("config.json", "version https://git-lfs.github.com/spec/v1\n"),
        ("git lfs pull",),
    ),
    "other model": (
        config(model_type="gemma3"),
        (
            'model_type: expected "qwen3", "qwen2", "llama", "mistral" or "qwen3_5_text", '
            'found "gemma3"',
        ),
    ),
    "a list of models": (config(model_type=["llama"]), ("model_type: expected", "a list of 1")),
    "no model": (config(model_type=...), ("model_type: expected", "found null")),
    "weights of another model": (
        config(model_type="llama"),
        ("model.layers.0.self_attn.q_norm.weight", "has no place in a model of architecture llama"),
    ),
    "Qwen2 without biases": (
        config(model_type="qwen2"),
        ("weight model.layers.0.self_attn.q_proj.bias", "is missing"),
    ),
    "Llama with biases": (
        config(model_type="llama", attention_bias=True),
        ("attention_bias: expected false, found true", "plain llama models"),
    ),
    "Mistral with a window": (
        config(model_type="mistral", sliding_window=4096),
        ("sliding_window: expected nothing, found 4096",),
    ),
    "Mistral with the window of old": (
        config(model_type="mistral"),
        ("sliding_window: is missing, and not without effect",),
    ),
    "Mistral with the KV heads of old": (
        config(model_type="mistral", sliding_window=None, num_key_value_heads=...),
        ("num_key_value_heads: is missing",),
    ),
    "attention bias": (config(attention_bias=True), ("attention_bias: expected false",)),
    "mlp bias": (config(mlp_bias=True), ("mlp_bias",)),
    "activation": (config(hidden_act="gelu"), ('hidden_act: expected "silu", found "gelu"',)),
    "sliding window": (config(use_sliding_window=True), ("use_sliding_window",)),
    "sliding layers": (
        config(layer_types=["full_attention", "sliding_attention"]),
        ("layer_types", "sliding-window layers are not supported"),
    ),
    "quantized": (
        config(quantization_config={"quant_method": "fp8"}),
        ("quantization_config: expected nothing", "convert the original checkpoint"),
    ),
    "experts": (config(num_experts=8), ("num_experts",)),
    "partial rotary": (config(partial_rotary_factor=0.5), ("partial_rotary_factor",)),
    "no hidden size": (config(hidden_size=...), ("config.json: hidden_size: is missing",)),
    "hidden size is text": (config(hidden_size="64"), ('expected an integer, found "64"',)),
    "hidden size is a flag": (config(hidden_size=True), ("expected an integer, found true",)),
    "no layers": (config(num_hidden_layers=0), ("expected 1 to 1024, found 0",)),
    "huge vocabulary": (config(vocab_size=10**12), ("vocab_size: expected 1 to",)),
    "heads do not divide": (config(num_key_value_heads=3), ("3 does not divide 4 heads",)),
    "odd head_dim": (config(head_dim=31), ("head_dim: expected an even number",)),
    "eps": (config(rms_norm_eps=0), ("rms_norm_eps: expected a number above 0",)),
    "eps is text": (config(rms_norm_eps="tiny"), ("rms_norm_eps: expected a number",)),
    "tied is text": (config(tie_word_embeddings="no"), ("expected true or false",)),
    "no block size": (config(block_size=...), ("block_size: is missing",)),
    "block of one": (config(block_size=1), ("block_size: expected 2 to",)),
    "no mask": (config(mask_token_id=None), ("mask_token_id: is missing",)),
    "mask outside": (config(mask_token_id=270), ("mask_token_id: expected 0 to 269",)),
    "bos is text": (config(bos_token_id="a"), ('bos_token_id: expected an integer, found "a"',)),
    # RoPE
    "no theta": (config(rope_parameters=None), ("rope_theta: is missing",)),
    "theta beyond float32": (config(rope_parameters={"rope_theta": 1e300}), ("up to 1e+30",)),
    "theta beyond float64": (
        text("config.json", json.dumps({**CONFIG, "rope_parameters": {"rope_theta": 10**400}})),
        ("rope_theta: expected a number above 0",),
    ),
    "two thetas": (config(rope_theta=5.0), ("rope_theta: contradicts rope_parameters",)),
    "two ropes": (
        config(rope_scaling={"type": "linear", "factor": 2}),
        ("rope_parameters: contradicts rope_scaling",),
    ),
    "rope is a list": (config(rope_parameters=[1]), ("rope_parameters: expected an object",)),
    "dynamic rope": (
        config(rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 2}),
        ('rope_scaling.rope_type: found "dynamic"', "only plain RoPE, linear scaling, Llama 3's"),
    ),
    "rope of no kind": (
        config(rope_parameters={"rope_theta": 1e4, "rope_type": ["yarn"]}),
        ("rope_parameters.rope_type: found a list of 1",),
    ),
    "linear without factor": (
        config(rope_parameters={"rope_theta": 1e4, "rope_type": "linear"}),
        ("rope_parameters.factor: is missing",),
    ),
    "llama3 of Qwen3": (
        llama3(),
        ("rope_parameters: has Llama 3's scaling", "GGUF files of qwen3 models have no place"),
    ),
    "llama3 without bounds": (llama3(low_freq_factor=...), ("low_freq_factor: is missing",)),
    "llama3 of equal bounds": (
        llama3(low_freq_factor=4.0),
        ("high_freq_factor: expected more than low_freq_factor, 4, found 4",),
    ),
    "factor without kind": (
        config(rope_parameters={"rope_theta": 1e4, "factor": 2.0}),
        ("rope_parameters.factor",),
    ),
    "mrope": (
        config(rope_parameters={"rope_theta": 1e4, "mrope_section": [1, 2]}),
        ("rope_parameters.mrope_section",),
    ),
    "partial rope": (yarn(partial_rotary_factor=0.5), ("partial_rotary_factor: is not 1",)),
    "yarn without factor": (
        yarn(factor=...),
        ("rope_parameters.factor: is missing, though rope_type is yarn", 'such as "factor": 4.0'),
    ),
    "yarn shrinks": (yarn(factor=0.5), ("factor: expected at least 1",)),
    "yarn of a fraction": (
        yarn(original_max_position_embeddings=64.5),
        ("rope_parameters.original_max_position_embeddings: expected an integer, found 64.5",),
    ),
    "yarn of other bounds": (
        yarn(beta_fast=16),
        ("rope_parameters.beta_fast: found 16", "llama.cpp takes 32"),
    ),
    "yarn untruncated": (yarn(truncate=False), ("rope_parameters.truncate: found false",)),
    # Weights
    "no weights": (remove("model.safetensors"), ("no weights: expected model.safetensors",)),
    "no heads": (
        weights(drop_heads),
        ("holds no diffusion heads", "though config.json has a block_size"),
    ),
    "a head is missing": (
        weights(lambda values: values.pop(DIFF)),
        (f"weight {DIFF} is missing",),
    ),
    "weights are missing": (
        weights(lambda values: [values.pop(name) for name in (Q, "lm_head.weight")]),
        ("weight lm_head.weight (and 1 more) is missing",),
    ),
    "another layer": (
        config(num_hidden_layers=1),
        ("model.layers.1.", "(and 16 more) has no place in a model of architecture qwen3"),
    ),
    "a bias": (
        weights(lambda values: values.update({"model.norm.bias": np.ones(64, np.float32)})),
        ("weight model.norm.bias has no place in a model of architecture qwen3",),
    ),
    "wrong shape": (
        weights(lambda values: values.update({Q: values[Q].T.copy()})),
        (f"weight {Q}: expected shape (128, 64), found (64, 128)",),
    ),
    "left empty by ZeRO-3": (
        weights(lambda values: values.update({Q: np.ones((0,), np.float32)})),
        (f"weight {Q} is empty: training with DeepSpeed's ZeRO-3", "zero_to_fp32.py"),
    ),
    "wrong head_dim": (config(head_dim=16), ("expected shape (64, 64), found (128, 64)",)),
    "float64": (weights(lambda values: None, "F64"), ("expected F32, F16, BF16, found F64",)),
    "tied head differs": (
        config(tie_word_embeddings=True),
        ("lm_head.weight differs from the embedding",),
    ),
    "NaN": (weights(poison(np.nan)), (f"weight {Q} holds NaN or infinity",)),
    "infinity": (weights(poison(-np.inf), "F16"), (f"weight {Q} holds NaN or infinity",)),
    "NaN in float32": (weights(poison(np.nan), "F32"), (f"weight {Q} holds NaN or infinity",)),
    # The safetensors file
    "empty file": (text("model.safetensors", ""), ("is no safetensors file (0 bytes)",)),
    "LFS pointer": (
        text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        ("is a Git LFS pointer",),
    ),
    "header too long": (
        text("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
        ("truncated, or no safetensors file",),
    ),
    "header longer than the file": (
        text("model.safetensors", struct.pack("<Q", 1000) + b"{}"),
        ("its header would have 1,000 bytes, the file has 10",),
    ),
    "header is no JSON": (
        text("model.safetensors", struct.pack("<Q", 2) + b"xx"),
        ("model.safetensors: is not valid JSON",),
    ),
    "truncated data": (resize(-1), ("model.safetensors: truncated: expected",)),
    "more data": (resize(1), ("longer than its header says",)),
    "entry is a number": (header(lambda h: h.update({Q: 5})), (f"tensor {Q}: expected dtype",)),
    "negative offset": (
        header(lambda h: h[Q].update(data_offsets=[-2, 10])),
        (f"tensor {Q}: expected dtype, shape and data_offsets",),
    ),
    "backward offsets": (header(lambda h: h[Q].update(data_offsets=[10, 2])), (f"tensor {Q}",)),
    "shape is text": (header(lambda h: h[Q].update(shape=["64"])), (f"tensor {Q}",)),
    "size and shape differ": (
        header(lambda h: h[Q].update(shape=[128, 63])),
        (f"tensor {Q}: expected 16,128 bytes for BF16 of shape (128, 63), found 16,384",),
    ),
    "overlap": (
        header(lambda h: h["model.norm.weight"].update(data_offsets=[0, 128])),
        ("the header is damaged",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damaged_checkpoints(name: str, tiny: Path, convert: Callable[..., Any]) -> None:
    damage, expected = CASES[name]
    damage(tiny)
    check_refusal(convert(tiny), *expected)


@pytest.mark.parametrize("flag", ["--split", "--heads-type=q8_0"])
def test_a_plain_model_has_no_heads(flag: str, tiny: Path, convert: Callable[..., Any]) -> None:
    weights(drop_heads)(tiny)
    config(block_size=..., mask_token_id=...)(tiny)
    expected = f"so there is nothing for {flag.split('=')[0]}"
    check_refusal(convert(tiny, flag), "holds no diffusion heads", expected)
    assert convert(tiny).code == 0


SHARDS = tuple(f"model-{shard:05d}-of-00003.safetensors" for shard in (1, 2, 3))
INDEX = "model.safetensors.index.json"


def rewrite_index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        write_json(folder / INDEX, index)

    return apply


SHARD_CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing shard": (remove(SHARDS[1]), (f"{SHARDS[1]}: missing shard (12 of 37 tensors",)),
    "truncated shard": (text(SHARDS[2], b"\0" * 7), (f"{SHARDS[2]}: is no safetensors file",)),
    "no index": (remove(INDEX), (f"there are safetensors files but no {INDEX}",)),
    "empty index": (text(INDEX, "{}"), ("weight_map: is missing or empty",)),
    "index is no JSON": (text(INDEX, "x"), (f"{INDEX}: is not valid JSON",)),
    "index names more": (
        rewrite_index(lambda entries: entries.update({"model.extra": SHARDS[0]})),
        (f"{SHARDS[0]}: tensor model.extra is missing, though {INDEX} names it",),
    ),
    "index names less": (
        rewrite_index(lambda entries: entries.pop(Q)),
        (f"holds tensor {Q}, which {INDEX} puts nowhere",),
    ),
    "index names another shard": (
        rewrite_index(lambda entries: entries.update({Q: SHARDS[2]})),
        (f"{SHARDS[0]}: holds tensor {Q}, which {INDEX} puts {SHARDS[2]}",),
    ),
    "index leads elsewhere": (
        rewrite_index(lambda entries: entries.update({Q: "../secret.safetensors"})),
        ("is in '../secret.safetensors', no file name",),
    ),
    "index names pickles": (
        rewrite_index(lambda entries: entries.update({Q: "pytorch_model.bin"})),
        ("pytorch_model.bin is no safetensors file",),
    ),
    "index of numbers": (
        rewrite_index(lambda entries: entries.update({Q: 1})),
        ("is in 1, no file name",),
    ),
}


@pytest.mark.parametrize("name", SHARD_CASES)
def test_damaged_shards(name: str, tmp_path: Path, convert: Callable[..., Any]) -> None:
    folder = write_checkpoint(tmp_path / "m", n_shards=3)
    assert len(shapes(CONFIG)) == 37
    damage, expected = SHARD_CASES[name]
    damage(folder)
    check_refusal(convert(folder), *expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(name: str, tiny: Path, convert: Callable[..., Any]) -> None:
    (tiny / "model.safetensors").rename(tiny / name)
    check_refusal(convert(tiny), f"{name} is a pickle checkpoint", "safetensors")


def test_not_a_checkpoint_folder(tmp_path: Path, convert: Callable[..., Any]) -> None:
    check_refusal(convert(tmp_path / "nothing"), "nothing: no such folder", "hf download")
    for name, expected in (("a.gguf", "the file is empty"), ("a.bin", "is not a folder")):
        (tmp_path / name).touch()
        check_refusal(convert(tmp_path / name), expected)


@pytest.mark.parametrize(
    ("flag", "dtype", "value", "advice"),
    [
        ("f16", "BF16", 65536.0, "65536 is too large for F16; use --type bf16"),
        ("f16", "F32", -65520.0, "65520 is too large for F16"),
        ("q8_0", "BF16", 2.0**24, "is too large for Q8_0; use --type bf16"),
        ("bf16", "F32", 3.4e38, "is too large for BF16; use --type f32"),
    ],
)
def test_values_that_a_type_cannot_hold(
    flag: str, dtype: str, value: float, advice: str, tiny: Path, convert: Callable[..., Any]
) -> None:
    weights(poison(value), dtype)(tiny)
    check_refusal(convert(tiny, "--type", flag), Q, advice)


def test_the_largest_values_that_types_hold(tiny: Path, convert: Callable[..., Any]) -> None:
    weights(poison(65519.0), "F32")(tiny)
    assert convert(tiny, "--type", "f16").code == 0
    weights(poison(65504.0 * 127), "F32")(tiny)
    assert convert(tiny, "--type", "q8_0", "--overwrite").code == 0


def test_a_shard_that_shrinks_while_it_is_read(
    tiny: Path, convert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink(*args: Any, **named: Any) -> list[int]:
        resize(-5)(tiny)
        return write(*args, **named)

    write = writer.write_files
    monkeypatch.setattr(cli, "write_files", shrink)
    check_refusal(convert(tiny), "ends within tensor", "has it changed meanwhile?")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--type", "q9_k"], "invalid choice"),
        (["--nonsense"], "unknown option --nonsense"),
    ],
)
def test_wrong_flags(
    flags: list[str], expected: str, tiny: Path, convert: Callable[..., Any]
) -> None:
    check_refusal(convert(tiny, *flags), expected, "--help")


def test_verbose_adds_the_traceback(tmp_path: Path, convert: Callable[..., Any]) -> None:
    run = convert(tmp_path / "nothing", "--verbose")
    assert run.code == 1
    assert run.stderr.startswith("Traceback")
    assert run.stderr.splitlines()[-1].startswith("orthrus-convert: error: ")
