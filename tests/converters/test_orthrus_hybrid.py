"""Checkpoints of hybrids with diffusion heads: twins of both kinds of layers, in one file, in two,
and grafted onto a stock model; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hf_checkpoint import write_safetensors
from hf_hybrid import write_hybrid
from mtp_models import CONFIG, mtp_model, mtp_weights, stock_model
from numpy.typing import NDArray
from orthrus_converters.cli import main
from orthrus_hybrid import BLOCK, HEADS_CONFIG, MASK, heads_model, heads_weights

from orthrus_gguf.cli import inspect
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.tensors import is_diffusion_tensor, original_of, twin_of

DELTA_NET = ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_conv1d", "ssm_norm", "ssm_out")
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm")


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(path: Path) -> dict[str, NDArray[Any]]:
    return {name: tensor.data for name, tensor in tensors_of(path).items()}


def same(one: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(data, other[name]) for name, data in one.items()
    )


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.weight", "blk.1.attn_k.bias", "blk.2.ssm_a", "blk.2.ssm_dt.bias"]
)
def test_names(name: str) -> None:
    twin = twin_of(name)
    assert is_diffusion_tensor(twin)
    assert not is_diffusion_tensor(name)
    assert original_of(twin) == original_of(name) == name


def test_every_twin(tmp_path: Path) -> None:
    """Of both kinds of layers, with what is done to the originals: a checkpoint whose heads are
    its base's weights gives twins that equal their originals."""
    folder = write_hybrid(tmp_path / "copies", HEADS_CONFIG, heads_weights(0.0), dtype="F32")
    path = tmp_path / "copies.gguf"
    assert main([str(folder), str(path), "--type", "f32"]) == 0
    found = values(path)
    twins = {name for name in found if is_diffusion_tensor(name)}
    expected = {f"blk.{i}.{part}_diff.weight" for i in range(3) for part in DELTA_NET}
    expected |= {f"blk.{i}.{part}" for i in range(3) for part in ("ssm_a_diff", "ssm_dt_diff.bias")}
    expected |= {f"blk.3.{part}_diff.weight" for part in ATTENTION}
    assert twins == expected
    for twin in twins:
        np.testing.assert_array_equal(found[twin], found[original_of(twin)])
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "orthrus"
    assert fields["orthrus.base_architecture"] == "qwen35"
    assert fields["orthrus.diffusion.block_size"] == BLOCK
    assert fields["tokenizer.ggml.mask_token_id"] == MASK
    assert fields["orthrus.ssm.group_count"] == 2


def test_quantized_twins_take_the_default_type() -> None:
    """And leave the counts of the mix alone; small convolutions stay as they are."""
    found = tensors_of(heads_model("q8_0"))
    assert found["blk.0.attn_qkv_diff.weight"].tensor_type.name == "Q8_0"
    assert found["blk.0.ssm_conv1d_diff.weight"].tensor_type.name == "F32"
    stock = tensors_of(stock_model())
    for name in found.keys() & stock.keys():
        assert found[name].shape.tolist() == stock[name].shape.tolist()


def test_apart_and_together_again(tmp_path: Path) -> None:
    """Split and merged: the same tensors; the base is the stock model's."""
    whole, base, merged = heads_model(mtp=True), tmp_path / "base.gguf", tmp_path / "merged.gguf"
    assert main([str(whole), str(base), "--split"]) == 0
    heads = tmp_path / "base-heads.gguf"
    assert same(values(base), values(mtp_model()))
    with ModelFile.open(base, heads) as file:
        assert (file.config.block_size, file.config.mask_token) == (BLOCK, MASK)
        assert file.config.n_blocks == 5
    assert main([str(base), str(merged), "--merge", "--heads", str(heads)]) == 0
    assert same(values(merged), values(whole))
    with ModelFile.open(merged) as file:
        assert file.config.hybrid is not None
        assert file.config.hybrid.mtp


@pytest.mark.parametrize("stock", [mtp_model, stock_model])
def test_grafted(
    stock: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder with the base's weights, onto a model with an MTP block or without."""
    folder = write_hybrid(tmp_path / "heads", HEADS_CONFIG, heads_weights(), dtype="F32")
    path = tmp_path / "grafted.gguf"
    argv = ["--base", str(stock()), "--heads", str(folder), str(path), "--heads-type", "f32"]
    assert main(argv) == 0
    assert "AR tensors agree" in capsys.readouterr().err
    found, base, whole = values(path), values(stock()), values(heads_model())
    assert same({name: found[name] for name in base}, base)
    twins = {name for name in found if is_diffusion_tensor(name)}
    assert same({name: found[name] for name in twins}, {name: whole[name] for name in twins})
    assert len(twins) == 3 * 9 + 6
    with ModelFile.open(path) as file:
        assert file.config.has_heads


def test_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(heads_model()), "--verify"]) == 0
    assert "no damage found" in capsys.readouterr().out
    assert inspect.main([str(heads_model())]) == 0
    shown = capsys.readouterr().out
    assert "blocks of 8, mask 261" in shown
    assert "3 of the layers, 2 key and 4 value" in shown
    assert inspect.main([str(heads_model()), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["heads"]["tensors"] == 3 * 9 + 6


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.gguf")
    some = heads_weights()
    lost = "model.layers.1.linear_attn.A_log_diff"
    missing = {name: w for name, w in some.items() if name != lost}
    folder = write_hybrid(tmp_path / "missing", HEADS_CONFIG, missing)
    assert f"weight {lost} is missing" in refused([str(folder), out], capsys)
    strange = {**some, "model.layers.3.linear_attn.A_log_diff": np.ones(4, np.float32)}
    folder = write_hybrid(tmp_path / "strange", HEADS_CONFIG, strange)
    assert "A_log_diff has no place" in refused([str(folder), out], capsys)
    bare = {key: value for key, value in HEADS_CONFIG.items() if key != "mask_token_id"}
    folder = write_hybrid(tmp_path / "bare", bare, some)
    assert "mask_token_id: is missing" in refused([str(folder), out], capsys)
    none = {name: w for name, w in some.items() if "_diff" not in name}
    folder = write_hybrid(tmp_path / "none", HEADS_CONFIG, none)
    assert "holds no diffusion heads" in refused([str(folder), out], capsys)
    assert not Path(out).exists()


def test_heads_of_other_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same model with other DeltaNet heads."""
    wide = {"linear_num_key_heads": 4}
    folder = write_hybrid(tmp_path / "heads", HEADS_CONFIG, heads_weights())
    twins = {name: w for name, w in heads_weights().items() if "_diff" in name}
    write_safetensors(folder / "model.safetensors", twins, "F32")
    (folder / "config.json").write_text(json.dumps(HEADS_CONFIG | wide))
    argv = ["--base", str(stock_model()), "--heads", str(folder), str(tmp_path / "out.gguf")]
    assert "expected shape" in refused([*argv, "--heads-type", "f32"], capsys)
    whole, base = heads_model(), tmp_path / "base.gguf"
    assert main([str(whole), str(base), "--split"]) == 0
    reader = gguf.GGUFReader(tmp_path / "base-heads.gguf", "r+")
    reader.fields["orthrus.ssm.group_count"].parts[-1][0] = 4
    reader.data.flush()
    with pytest.raises(OrthrusError, match="its DeltaNet layers have other sizes"):
        ModelFile.open(base, tmp_path / "base-heads.gguf")


def test_a_stock_checkpoint_is_one_still(tmp_path: Path) -> None:
    folder = write_hybrid(tmp_path / "stock", CONFIG, mtp_weights(), dtype="F32")
    path = tmp_path / "stock.gguf"
    assert main([str(folder), str(path), "--type", "f32"]) == 0
    assert not any(map(is_diffusion_tensor, values(path)))
