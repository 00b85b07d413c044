"""Quantized tensors: bytes against libgguf, an independent build of the quantizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
from damage import check_refusal
from hf_checkpoint import CONFIG, Weights, random_weights, write_checkpoint
from imatrix_files import random_importance, write_dat, write_gguf
from numpy.typing import NDArray
from orthrus_converters.encode import _to_float16
from orthrus_converters.file_types import FILE_TYPES
from orthrus_converters.tensor_names import _hf_name

from orthrus_gguf.ggml.library import load_library

#: Rows of 256 and 512, so that every type fits.
WIDE: dict[str, Any] = {
    **CONFIG,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "vocab_size": 264,
}
#: Types that take seconds: quantized for a few matrices only.
#: The first quantization of a process to some of them prepares tables for many seconds.
NEEDY = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")
SLOWEST = ("iq1", "iq2_m", "iq2_s", "iq2_xs")
USUAL = [name for name in FILE_TYPES if name not in ("f32", "f16", "bf16", *NEEDY)]


def test_float16_is_numpys() -> None:
    """Every bfloat16 that fits, and random bits: rounded to the nearest, ties to even."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    random_bits = np.random.default_rng(4).integers(0, 1 << 32, 1 << 18, np.uint32)
    values = np.concatenate([upper, random_bits]).view(np.float32)
    values = values[np.abs(values) < 65520]  # not NaN either
    expected = values.astype(np.float16)
    found = _to_float16(load_library().api, values)
    assert np.array_equal(found.view(np.uint16), expected.view(np.uint16))


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Normally distributed, rounded to what bfloat16 holds."""
    rng = np.random.default_rng(5)
    found = {}
    for name, values in random_weights(WIDE).items():
        bits = rng.normal(0, 0.05, values.shape).astype(np.float32).view(np.uint32)
        found[name] = (bits & 0xFFFF0000).view(np.float32)
    return found


@pytest.fixture(scope="module")
def wide(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "m", WIDE, weights)


@pytest.fixture(scope="module")
def importance() -> dict[str, NDArray[np.float32]]:
    """For the AR matrices and one of the twins; none for the embedding, as from llama-imatrix."""
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{part}.weight": (1, 512 if part == "ffn_down" else 256) for part in parts}
    return random_importance({**shapes, "blk.0.attn_k_diff.weight": (1, 256)})


def check_bytes(
    path: Path, weights: Weights, importance: dict[str, NDArray[np.float32]] | None = None
) -> set[str]:
    """Compare every quantized tensor of the file; return the names of the types seen."""
    seen = set()
    for tensor in gguf.GGUFReader(path).tensors:
        seen.add(tensor.tensor_type.name)
        values = weights[_hf_name(tensor.name)]
        if tensor.tensor_type.name in ("F32", "F16", "BF16"):
            continue
        columns = None
        if importance is not None:
            ar_name = tensor.name.replace("_diff", "")
            columns = importance.get(tensor.name, importance.get(ar_name))
        expected = libgguf.quantize_rows(values, tensor.tensor_type.value, imatrix=columns)
        np.testing.assert_array_equal(
            tensor.data.reshape(-1), expected.reshape(-1).view(np.uint8), tensor.name
        )
    return seen


@pytest.mark.parametrize("name", USUAL)
def test_bytes_equal_libgguf(
    name: str, wide: Path, weights: Weights, convert: Callable[..., Any], out: Path
) -> None:
    assert convert(wide, "--type", name).code == 0
    assert FILE_TYPES[name].weights.name in check_bytes(out / "model.gguf", weights)


@pytest.mark.parametrize("write", [write_dat, write_gguf])
@pytest.mark.parametrize("name", ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q2_k_s", "q4_0", "iq4_xs"])
def test_bytes_with_an_imatrix(
    name: str,
    write: Callable[..., None],
    wide: Path,
    weights: Weights,
    importance: dict[str, NDArray[np.float32]],
    convert: Callable[..., Any],
    out: Path,
    tmp_path: Path,
) -> None:
    write(tmp_path / "im", importance)
    run = convert(wide, "--type", name, "--imatrix", str(tmp_path / "im"))
    assert run.code == 0, run.stderr
    check_bytes(out / "model.gguf", weights, importance)
    fields = gguf.GGUFReader(out / "model.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if "imatrix" in key}
    assert found == {
        "quantize.imatrix.file": "im",
        "quantize.imatrix.dataset": "x.txt",
        "quantize.imatrix.entries_count": 8,
        "quantize.imatrix.chunks_count": 7,
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith(SLOWEST) else name
        for name in NEEDY
    ],
)
def test_types_that_need_an_imatrix(
    name: str,
    wide: Path,
    weights: Weights,
    importance: dict[str, NDArray[np.float32]],
    convert: Callable[..., Any],
    out: Path,
    tmp_path: Path,
) -> None:
    few = ("--tensor-type", r"ffn|attn_(output|q|v_diff)|attn_k\.=q8_0")
    refused = convert(wide, "--type", name, "--tensor-type", "ffn=q4_0")
    check_refusal(refused, "which is garbage without an imatrix: pass --imatrix FILE")
    write_gguf(tmp_path / "im.gguf", importance)
    run = convert(wide, "--type", name, "--imatrix", str(tmp_path / "im.gguf"), *few)
    assert run.code == 0, run.stderr
    assert FILE_TYPES[name].weights.name in check_bytes(out / "model.gguf", weights, importance)


def test_an_imatrix_without_some_tensors(
    wide: Path,
    importance: dict[str, NDArray[np.float32]],
    convert: Callable[..., Any],
    tmp_path: Path,
) -> None:
    partial = {name: v for name, v in importance.items() if "ffn_up" not in name}
    write_dat(tmp_path / "im.dat", partial)
    flags = ("--imatrix", str(tmp_path / "im.dat"))
    run = convert(wide, "--type", "q4_k_m", *flags)
    assert "im.dat: has nothing for blk.0.ffn_up.weight; quantized without" in run.stderr
    run = convert(wide, "--type", "q2_k_s", "--overwrite", *flags)
    assert run.code == 1
    assert "tensor blk.0.ffn_up.weight would become Q2_K" in run.stderr
    assert "im.dat has nothing for it" in run.stderr


def test_threads_do_not_change_the_file(
    wide: Path, convert: Callable[..., Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orthrus_converters.encode.CHUNK", 1000)  # dozens of jobs per tensor
    files = []
    for threads in ("1", "2", "7"):
        assert convert(wide, "--type", "q4_k_m", "--threads", threads, "--overwrite").code == 0
        files.append((out / "model.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("count", ["0", "-1", "x", "5000"])
def test_thread_counts(count: str, wide: Path, convert: Callable[..., Any]) -> None:
    check_refusal(convert(wide, f"--threads={count}"), "expected 1 to 1024")


def test_values_that_scales_cannot_hold(
    weights: Weights, tmp_path: Path, convert: Callable[..., Any]
) -> None:
    large = {**weights, "lm_head.weight": weights["lm_head.weight"] + 70000}
    folder = write_checkpoint(tmp_path / "large", WIDE, large, dtype="F32")
    check_refusal(convert(folder, "--type", "q4_1"), "lm_head.weight", "is too large for Q6_K")
