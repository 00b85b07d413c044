"""YaRN: stock llama.cpp and we find the same in files of either converter, single and split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hf_checkpoint import CONFIG, random_weights, write_checkpoint
from orthrus_converters.gguf_source import new_writer, open_model
from stock import Stock

from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import ar_segment
from orthrus_gguf.runtime.reference import ReferenceModel

PROMPT = [7, 91, 33, 64, 12, 101, 88, 45] * 4
N_VOCAB = CONFIG["vocab_size"]
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def checkpoint(folder: Path, **settings: object) -> Path:
    """With heads that look closely: what is turned otherwise is weighed otherwise."""
    weights = random_weights(CONFIG)
    for name, values in weights.items():
        if name.endswith(("q_norm.weight", "k_norm.weight", "v_proj.weight", "o_proj.weight")):
            values *= 8
    config = {**CONFIG, "rope_parameters": {**YARN, **settings}}
    return write_checkpoint(folder, config, weights, dtype="F32")


def logits(path: Path) -> Any:
    """Of the prompt's rows, in the reference runtime."""
    with ModelFile.open(path) as file:
        model = ReferenceModel(file)
    [rows] = model.logits([ar_segment(model.new_cache(len(PROMPT)), PROMPT, 0)])
    return rows


def check_stock(path: Path) -> None:
    """llama.cpp's probabilities of every token after the prompt are ours."""
    [entry] = Stock(path, "f32", 128).greedy(PROMPT, 1, N_VOCAB)
    ours = logits(path)[-1].astype(np.float64)
    ours -= np.log(np.exp(ours).sum())
    assert len(entry["top_logprobs"]) == N_VOCAB
    for found in entry["top_logprobs"]:
        assert found["logprob"] == pytest.approx(ours[found["id"]], abs=1e-3), found["id"]


def with_keys(source: Path, target: Path, **keys: float) -> Path:
    """A copy with more keys about RoPE's scaling, as llama.cpp's converter spells them."""
    entries = open_model(source).entries
    for key, value in keys.items():
        entries[f"qwen3.rope.scaling.{key}"] = gguf.GGUFValue(value, gguf.GGUFValueType.FLOAT32)
    writer = new_writer(entries)
    for tensor in gguf.GGUFReader(source).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("attention_factor", [None, 1.0, 1.5])
def test_magnitude(
    attention_factor: float | None, tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    """Split and single files say the same, to us and to llama.cpp."""
    folder = checkpoint(tmp_path / "m", attention_factor=attention_factor)
    assert convert(folder, "--type", "f32").code == 0
    single = logits(out / "model.gguf")
    assert convert(folder, "--type", "f32", "--split", "--overwrite").code == 0
    np.testing.assert_array_equal(logits(out / "model.gguf"), single)
    check_stock(out / "model.gguf")


def test_magnitudes_differ(tmp_path: Path, convert: Callable[..., Any], out: Path) -> None:
    """The check above sees a wrong one: the logits move by far more than its tolerance."""
    found = []
    for name, factor in (("a", None), ("b", 1.0)):
        folder = checkpoint(tmp_path / name, attention_factor=factor)
        assert convert(folder, "--type", "f32", "--overwrite").code == 0
        found.append(logits(out / "model.gguf")[-1])
    assert np.abs(found[0] - found[1]).max() > 0.02


@pytest.mark.parametrize(
    "keys",
    [
        {"yarn_attn_factor": 1.1386294},
        {"yarn_attn_factor": 1.0},
        {"yarn_beta_fast": 8.0, "yarn_beta_slow": 4.0},
        {"yarn_ext_factor": 0.25},
        {"attn_factor": 0.87824887},
    ],
    ids=lambda keys: "+".join(keys),
)
def test_keys_of_llama_cpps_converter(
    keys: dict[str, float], tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    folder = checkpoint(tmp_path / "m")
    assert convert(folder, "--type", "f32", "--split").code == 0
    path = with_keys(out / "model.gguf", tmp_path / "stock.gguf", **keys)
    check_stock(path)
    same = np.array_equal(logits(path), logits(out / "model.gguf"))
    assert same == ("attn_factor" not in keys)


def test_the_key_that_we_write(tmp_path: Path, convert: Callable[..., Any], out: Path) -> None:
    assert convert(checkpoint(tmp_path / "m", attention_factor=1.0), "--split").code == 0
    with GGUFFile.open(out / "model.gguf") as file:
        scaling = {k for k in file.metadata if ".scaling." in k}
    assert scaling == {
        f"qwen3.rope.scaling.{key}"
        for key in ("type", "factor", "original_context_length", "attn_factor")
    }
