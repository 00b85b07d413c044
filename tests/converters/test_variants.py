"""Checkpoints of other shapes, spellings and types than the demo's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hf_checkpoint import (
    CONFIG,
    Weights,
    random_weights,
    write_checkpoint,
    write_json,
    write_raw_safetensors,
    write_safetensors,
)

from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.model.file import ModelFile


def changed(**changes: Any) -> dict[str, Any]:
    """CONFIG with changes; a change to ... removes the field."""
    config = {**CONFIG, **changes}
    return {key: value for key, value in config.items() if value is not ...}


def model_of(folder: Path, convert: Callable[..., Any], out: Path) -> ModelConfig:
    """Convert and read back the model's config."""
    assert convert(folder).stderr.count("error") == 0
    with ModelFile.open(out / "model.gguf") as file:
        return file.config


def values_of(path: Path) -> Weights:
    """All tensors as float32, in numpy's order of dimensions."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def check_values(found: Mapping[str, Any], weights: Weights) -> None:
    """A sample of names: test_demo has all of them."""
    for name, source in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_output_diff.weight": "model.layers.1.self_attn.o_proj_diff.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    }.items():
        np.testing.assert_array_equal(found[name], weights[source], name)


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize(("dtype", "kind"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32")])
def test_source_types_are_kept(
    dtype: str, kind: str, n_shards: int, tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    folder = write_checkpoint(tmp_path / "m", dtype=dtype, n_shards=n_shards)
    assert convert(folder).code == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    check_values(values_of(out / "model.gguf"), random_weights(CONFIG))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("flag", ["bf16", "f16", "f32"])
def test_every_float_type_from_every_other(
    dtype: str, flag: str, tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    folder = write_checkpoint(tmp_path / "m", dtype=dtype)
    assert convert(folder, "--type", flag).code == 0
    check_values(values_of(out / "model.gguf"), random_weights(CONFIG))


def test_bf16_rounds_to_nearest_even(
    tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    weights = random_weights(CONFIG)
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF], np.uint32)
    weights["lm_head.weight"][0, :4] = bits.view(np.float32)
    folder = write_checkpoint(tmp_path / "m", weights=weights, dtype="F32")
    assert convert(folder, "--type", "bf16").code == 0
    found = values_of(out / "model.gguf")["output.weight"][0, :4]
    assert (found.view(np.uint32) >> 16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80]


def test_every_bfloat16_becomes_the_nearest_float16(
    tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    """All that F16 can hold, with its subnormals and zeros."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    with np.errstate(invalid="ignore"):
        values = bits.view(np.float32)[np.abs(bits.view(np.float32)) < 65520]
    assert values.size == 2 * 0x4780
    config = changed(vocab_size=600)
    weights = random_weights(config)
    weights["lm_head.weight"].reshape(-1)[: values.size] = values
    folder = write_checkpoint(tmp_path / "m", config, weights)
    assert convert(folder, "--type", "f16").code == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    found = tensors["output.weight"].data.reshape(-1)[: values.size]
    np.testing.assert_array_equal(found.view(np.uint16), values.astype(np.float16).view(np.uint16))


def test_untied_head_dim_and_gqa(tiny: Path, convert: Callable[..., Any], out: Path) -> None:
    config = model_of(tiny, convert, out)
    assert (config.tied, config.head_dim, config.n_embd, config.n_head) == (False, 32, 64, 4)
    names = [tensor.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors]
    assert names[:3] == ["token_embd.weight", "output.weight", "blk.0.attn_norm.weight"]
    assert names[-1] == "output_norm.weight"


def test_missing_head_dim_follows_from_the_hidden_size(
    tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    folder = write_checkpoint(tmp_path / "m", changed(head_dim=...))
    assert model_of(folder, convert, out).head_dim == 16


def test_missing_tie_word_embeddings_means_untied(
    tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    """As in transformers' Qwen3Config."""
    folder = write_checkpoint(tmp_path / "m", CONFIG)
    write_json(folder / "config.json", changed(tie_word_embeddings=...))
    assert not model_of(folder, convert, out).tied


def test_tied_head_that_is_stored_is_dropped(
    tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    config = changed(tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    folder = write_checkpoint(tmp_path / "m", config, weights)
    assert model_of(folder, convert, out).tied
    assert "output.weight" not in values_of(out / "model.gguf")


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}

ROPES: dict[str, tuple[dict[str, Any], Rope]] = {
    "old": ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
    "both": ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, Rope(5e5)),
    "old yarn": (
        {
            "rope_theta": 1e6,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        Rope(1e6, 4.0, 64, ext_factor=1.0),
    ),
    "new yarn": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 2,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1,
                "truncate": True,
            }
        },
        Rope(1e6, 2.0, 32, ext_factor=1.0),
    ),
    "original context as a float": (
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 64.0}},
        Rope(1e6, 4.0, 64, ext_factor=1.0),
    ),
    "no original context: the model's": (
        {"rope_parameters": YARN},
        Rope(1e6, 4.0, 128, ext_factor=1.0),
    ),
    "original context outside, which counts": (
        {
            "rope_parameters": {**YARN, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 32,
        },
        Rope(1e6, 4.0, 32, ext_factor=1.0),
    ),
    "the factor that the contexts tell": (
        {"rope_parameters": {**YARN, "factor": None, "original_max_position_embeddings": 32}},
        Rope(1e6, 4.0, 32, ext_factor=1.0),
    ),
    "settings that nobody reads": (
        {"rope_parameters": {**YARN, "attn_factor": 3, "extrapolation_factor": 2, "finetuned": 1}},
        Rope(1e6, 4.0, 128, ext_factor=1.0),
    ),
    "one mscale alone": (
        {"rope_parameters": {**YARN, "mscale": 0.7}},
        Rope(1e6, 4.0, 128, ext_factor=1.0),
    ),
    "magnitude at its default": (
        {"rope_parameters": {**YARN, "attention_factor": 1.1386294}},
        Rope(1e6, 4.0, 128, ext_factor=1.0),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_spellings(name: str, tmp_path: Path, convert: Callable[..., Any], out: Path) -> None:
    changes, expected = ROPES[name]
    folder = write_checkpoint(tmp_path / "m", {**changed(rope_parameters=...), **changes})
    assert model_of(folder, convert, out).rope == expected


def test_yarn_keys(tmp_path: Path, convert: Callable[..., Any], out: Path) -> None:
    changes, _ = ROPES["old yarn"]
    folder = write_checkpoint(tmp_path / "m", {**changed(rope_parameters=...), **changes})
    assert convert(folder, "--split").code == 0
    for file, arch in (("model.gguf", "qwen3"), ("model-heads.gguf", "orthrus")):
        fields = gguf.GGUFReader(out / file).fields
        found = {key: field.contents() for key, field in fields.items() if ".rope." in key}
        assert found == {
            f"{arch}.rope.freq_base": 1e6,
            f"{arch}.rope.scaling.type": "yarn",
            f"{arch}.rope.scaling.factor": 4.0,
            f"{arch}.rope.scaling.original_context_length": 64,
        }


@pytest.mark.parametrize("attention_factor", [1.0, 1.25, 1 + 0.1 * math.log(4)])
def test_yarn_attention_factor(
    attention_factor: float, tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    """transformers scales by attention_factor; ggml by its factor times (1 + 0.1 ln 4)."""
    yarn = {**ROPES["old yarn"][0]["rope_scaling"], "attention_factor": attention_factor}
    folder = write_checkpoint(
        tmp_path / "m", changed(rope_parameters=..., rope_theta=1e6, rope_scaling=yarn)
    )
    rope = model_of(folder, convert, out).rope
    assert rope.attn_factor * (1 + 0.1 * math.log(rope.factor)) == pytest.approx(attention_factor)


def test_yarn_mscale(tmp_path: Path, convert: Callable[..., Any], out: Path) -> None:
    """In transformers, a ratio of two magnitudes."""
    yarn = {**YARN, "mscale": 0.5, "mscale_all_dim": 2.0}
    folder = write_checkpoint(tmp_path / "m", changed(rope_parameters=yarn))
    rope = model_of(folder, convert, out).rope
    expected = (1 + 0.05 * math.log(4)) / (1 + 0.2 * math.log(4))
    assert rope.attn_factor * (1 + 0.1 * math.log(4)) == pytest.approx(expected)


def test_unread_yarn_settings_are_named(tmp_path: Path, convert: Callable[..., Any]) -> None:
    yarn = {**YARN, "attn_factor": 1.2}
    run = convert(write_checkpoint(tmp_path / "m", changed(rope_parameters=yarn)))
    assert run.code == 0
    assert "ignored unknown fields: rope_parameters.attn_factor" in run.stderr


def test_fields_without_effect_are_silent_and_unknown_ones_are_named(
    tmp_path: Path, convert: Callable[..., Any]
) -> None:
    dead = changed(r=128, lora_alpha=256, torch_dtype="bfloat16", sliding_window=4096)
    assert "note" not in convert(write_checkpoint(tmp_path / "a", dead)).stderr
    other = write_checkpoint(tmp_path / "b", changed(zeta=1, omega="x"))
    run = convert(other, "--overwrite")
    assert run.code == 0
    assert "ignored unknown fields: omega, zeta" in run.stderr


def test_rows_that_do_not_fit_q8_0_become_f16(
    tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    folder = write_checkpoint(tmp_path / "m", changed(intermediate_size=100))
    run = convert(folder, "--type", "q8_0")
    assert run.code == 0
    assert (
        "note: blk.0.ffn_down.weight and 1 more: rows of 100 are no multiple of the qblock of Q8_0;"
        " written as F16" in run.stderr
    )
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert kinds["blk.1.ffn_down.weight"] == "F16"
    assert kinds["blk.1.ffn_up.weight"] == "Q8_0"


def test_rotary_buffers_of_old_checkpoints_are_ignored(
    tmp_path: Path, convert: Callable[..., Any]
) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    assert convert(write_checkpoint(tmp_path / "m", weights=weights)).code == 0


def test_headers_in_any_order_with_empty_tensors(
    tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    """What the safetensors library opens: names in any order, nothing between two tensors."""
    weights = random_weights(CONFIG)
    folder = write_checkpoint(tmp_path / "m", weights=weights)
    assert convert(folder).code == 0
    expected = (out / "model.gguf").read_bytes()
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entries = dict(reversed(header.items()))
    starts = sorted({entry["data_offsets"][0] for key, entry in header.items() if key[0] != "_"})
    for number, place in enumerate([*starts[:3], len(data) - 8 - size]):
        empty = {"dtype": "F32", "shape": [0, 4], "data_offsets": [place, place]}
        entries = {f"empty.{number}": empty, **entries, f"empty.{number}.b": empty}
    write_raw_safetensors(file, entries, data[8 + size :])
    assert convert(folder, "--overwrite").code == 0
    assert (out / "model.gguf").read_bytes() == expected


def test_a_single_file_beside_shards(
    tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    folder = write_checkpoint(tmp_path / "m", n_shards=3)
    assert convert(folder).code == 0
    expected = (out / "model.gguf").read_bytes()
    single = folder / "model.safetensors"
    for leftover in ({}, {name: np.ones(0, np.float32) for name in random_weights(CONFIG)}):
        write_safetensors(single, leftover, "BF16")
        run = convert(folder, "--overwrite")
        assert run.code == 0
        assert f"{single}: left out: it lacks " in run.stderr
        assert (out / "model.gguf").read_bytes() == expected
    other = {name: -values for name, values in random_weights(CONFIG).items()}
    write_safetensors(single, other, "BF16")
    run = convert(folder, "--overwrite")
    assert "read model.safetensors, as transformers does, and not the shards" in run.stderr
    check_values(values_of(out / "model.gguf"), other)


def test_tensors_larger_than_a_chunk(
    tmp_path: Path, convert: Callable[..., Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 3 and of 1 rows: nothing may be lost or repeated at their edges."""
    folder = write_checkpoint(tmp_path / "m")
    expected = {}
    for flag in ("bf16", "f32", "q8_0"):
        assert convert(folder, "--type", flag, "--overwrite").code == 0
        expected[flag] = (out / "model.gguf").read_bytes()
    monkeypatch.setattr("orthrus_converters.encode.CHUNK", 64 * 3 + 1)
    for flag, data in expected.items():
        assert convert(folder, "--type", flag, "--overwrite").code == 0
        assert (out / "model.gguf").read_bytes() == data
