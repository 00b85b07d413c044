"""Drafters in z-lab's layout become files in mainline llama.cpp's format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hybrid_dflash import dflash_file
from orthrus_converters.cli import main
from orthrus_converters.file_types import FILE_TYPES

from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "tiny-dflash-stdlib"
DemoFile = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint, free to be damaged."""
    return Path(shutil.copytree(FOLDER, tmp_path / "drafter"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def open_with(path: Path, target: Path) -> DrafterFile:
    with ModelFile.open(target) as model:
        return DrafterFile.open(path, model.config, model.metadata)


def test_all_that_the_format_asks_for(demo_file: DemoFile, tmp_path: Path) -> None:
    """Names, order and layer ids as in the file that mainline llama.cpp was seen to load."""
    out, target = tmp_path / "drafter.gguf", demo_file("q8_0")
    assert main([str(FOLDER), str(out), "--type", "f32", "--target", str(target)]) == 0
    reader = gguf.GGUFReader(out)
    names = [tensor.name for tensor in reader.tensors]
    assert names[:3] == ["fc.weight", "enc.output_norm.weight", "output_norm.weight"]
    assert len(names) == 3 + 2 * 11
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "dflash"
    assert fields["dflash.target_layers"] == [1, 3]  # ids 0 and 2
    assert (fields["dflash.block_size"], fields["tokenizer.ggml.mask_token_id"]) == (8, 4095)
    theirs = gguf.GGUFReader(target).fields
    for key, field in theirs.items():
        if key.startswith("tokenizer.") and key != "tokenizer.chat_template":
            assert fields[key] == field.contents()
    with open_with(out, target) as drafter:
        assert drafter.config.n_ff == 512
        assert drafter.config.rope.freq_base == 1e6


@pytest.mark.parametrize(("kind", "causal"), [("causal", None), ("ahead", False), ("full", None)])
def test_windows_for_a_hybrid(kind: str, causal: bool | None) -> None:
    """As llama.cpp's converter writes them: a flag for each layer, and whether attention is causal
    only where the checkpoint says that it is not."""
    found = gguf.GGUFReader(dflash_file(kind)).fields
    fields = {key: field.contents() for key, field in found.items()}
    size, pattern = "dflash.attention.sliding_window", "dflash.attention.sliding_window_pattern"
    if kind == "full":
        assert not {size, pattern} & {*fields}
    else:
        assert (fields[size], fields[pattern]) == (10, [True, True, False])
    assert fields.get("dflash.attention.causal") is causal
    assert fields["dflash.target_layers"] == [1, 3, 4]
    assert fields["dflash.rope.freq_base"] == 1e7
    assert fields["tokenizer.ggml.pre"] == "qwen35"


def test_tokens_of_a_folder(demo_file: DemoFile, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "drafter.gguf"
    assert main([str(FOLDER), str(out), "--target", str(checkpoint)]) == 0
    with open_with(out, demo_file("q8_0")) as drafter:
        assert {info.type.name for info in drafter.tensors.values()} == {"BF16", "F32"}
        assert len(drafter.metadata["tokenizer.ggml.tokens"]) == 4096  # type: ignore[arg-type]


def test_without_a_target_it_says_so(
    demo_file: DemoFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drafter.gguf"
    assert main([str(FOLDER), str(out)]) == 0
    assert "holds no tokenizer" in capsys.readouterr().err
    with open_with(out, demo_file("q8_0")) as drafter:
        assert "tokenizer.ggml.tokens" not in drafter.metadata


@pytest.mark.parametrize(
    "name", [name for name in FILE_TYPES if not name.startswith(("iq1", "iq2"))]
)
def test_all_types(name: str, demo_file: DemoFile, tmp_path: Path) -> None:
    """But those that need an imatrix."""
    out = tmp_path / "drafter.gguf"
    argv = [str(FOLDER), str(out), "--type", name, "--target", str(demo_file("q8_0"))]
    if main(argv) != 0:
        assert name in ("iq3_xxs", "iq3_xs", "q2_k_s")
        return
    kind = FILE_TYPES[name].weights
    with open_with(out, demo_file("q8_0")) as drafter:
        types = [info.type for info in drafter.tensors.values() if len(info.shape) > 1]
        assert types.count(kind) >= len(types) // 2
        assert drafter.tensors["fc.weight"].type == kind


def damaged(folder: Path, change: str) -> None:
    weights = folder / "model.safetensors"
    if change == "shape":
        change_config(folder, intermediate_size=256)
    elif change == "layers":
        change_config(folder, num_hidden_layers=1, layer_types=["full_attention"])
    elif change == "missing":
        change_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    elif change == "settings":
        change_config(folder, dflash_config=None)
    elif change == "ids":
        change_config(folder, dflash_config={"mask_token_id": 4095, "target_layer_ids": ["a"]})
    elif change == "mask":
        change_config(folder, dflash_config={"mask_token_id": 4096, "target_layer_ids": [0]})
    elif change == "window":
        change_config(folder, layer_types=["sliding_attention", "full_attention"])
    elif change == "short window":
        layers = ["sliding_attention", "full_attention"]
        change_config(folder, layer_types=layers, sliding_window=7)
    elif change == "layer types":
        change_config(folder, layer_types=["sliding_attention", "linear_attention"])
    elif change == "causal":
        change_config(folder, is_causal=True)
    elif change == "dflash2":
        change_config(folder, architectures=["DFlash2DraftModel"])
    elif change == "dspark":
        change_config(folder, architectures=["DSparkDraftModel"])
    elif change == "short":
        weights.write_bytes(weights.read_bytes()[:1_000_000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", "expected shape (256, 256), found (512, 256)"),
        ("layers", "weight layers.1.input_layernorm.weight has no place in it"),
        ("missing", "weight layers.2.input_layernorm.weight is missing"),
        ("settings", "dflash_config"),
        ("ids", "target_layer_ids"),
        ("mask", "mask_token_id"),
        ("window", "sliding_window: is missing"),
        ("short window", "sliding_window: expected 8 to"),
        ("layer types", 'expected "full_attention" or "sliding_attention" for each of 2 layers'),
        ("causal", "is_causal: expected false or nothing, found true"),
        ("dflash2", "is DFlash2DraftModel (DFlash 2, with convolutions and selectors)"),
        ("dspark", "is DSparkDraftModel (DSpark, with a Markov head)"),
        ("short", "model.safetensors"),
    ],
)
def test_damage(
    change: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(folder, change)
    out = tmp_path / "out" / "drafter.gguf"
    out.parent.mkdir()
    assert main([str(folder), str(out)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(out.parent.iterdir())


def test_flags_that_make_no_sense(
    demo_file: DemoFile, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, target = str(tmp_path / "out.gguf"), str(demo_file("q8_0"))
    for argv, message in (
        ([str(FOLDER), out, "--split"], "--split"),
        ([str(checkpoint), out, "--target", target], "--target"),
        ([target, out, "--target", target], "--target"),
        ([str(FOLDER), out, "--target", str(FOLDER)], "no tokenizer"),
    ):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out.gguf").exists()


def test_the_weights_are_those_of_the_checkpoint(demo_file: DemoFile, tmp_path: Path) -> None:
    """bf16 → f32 is exact: one matrix and one norm by hand."""
    out = tmp_path / "drafter.gguf"
    assert main([str(FOLDER), str(out), "--type", "f32"]) == 0
    blob = (FOLDER / "model.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}
    for ours, theirs in (
        ("fc.weight", "fc.weight"),
        ("enc.output_norm.weight", "hidden_norm.weight"),
        ("blk.1.ffn_down.weight", "layers.1.mlp.down_proj.weight"),
    ):
        first, last = header[theirs]["data_offsets"]
        half = np.frombuffer(blob[8 + size + first : 8 + size + last], np.uint16)
        wide = (half.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(tensors[ours].ravel(), wide)
