"""Inspection against independent sources: the gguf package, ggml, hashlib, the CPU runtime."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.inspection import stream, text
from orthrus_gguf.inspection.diff import diff_metadata, diff_tensors
from orthrus_gguf.inspection.report import inspect, value_json
from orthrus_gguf.inspection.scales import SCALES, bad_qblocks, is_known
from orthrus_gguf.inspection.summary import layer_of, summarize
from orthrus_gguf.inspection.verify import overall, verify
from tests.tiny_model import LAYER, N_LAYERS, TWINS, write_gguf, write_heads, write_model

TYPES = gguf.GGMLQuantizationType
PLAIN = ("I8", "I16", "I32", "I64", "F64")
QUANTIZED = [t for t in gguf.GGML_QUANT_SIZES if t.name not in PLAIN]


def random_qblocks(qtype: TYPES, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random bits: one F16 in 32 is NaN or infinite."""
    size = gguf.GGML_QUANT_SIZES[qtype][1]
    data = np.random.default_rng(seed).integers(0, 256, count * size, np.uint8)
    if qtype.name == "MXFP4":
        data.reshape(count, size)[::7, 0] = 255
    return data


# --- scales -----------------------------------------------------------------------------------


def test_every_type_is_known() -> None:
    """But for Q8_1, which no file holds and whose size in the gguf package is not ggml's."""
    assert {t.name for t in gguf.GGML_QUANT_SIZES if not is_known(t)} == {"Q8_1"}


@pytest.mark.parametrize("qtype", QUANTIZED, ids=lambda t: str(t.name))
def test_bad_scales_are_those_that_ggml_refuses(
    qtype: TYPES, capfd: pytest.CaptureFixture[str]
) -> None:
    """ggml_validate_row_data, qblock by qblock, on random bits."""
    base = next(Path(load_library().path).parent.glob("*ggml-base.*"), None)
    library = ctypes.CDLL(str(base or load_library().path))
    judge = library.ggml_validate_row_data
    judge.restype, judge.argtypes = ctypes.c_bool, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    size, count = gguf.GGML_QUANT_SIZES[qtype][1], 3000
    data = random_qblocks(qtype, count)
    if not is_known(qtype):
        pytest.skip("not a type of files")
    zeros = np.zeros(size, np.uint8)
    if not judge(int(qtype), zeros.ctypes.data, size):
        pytest.skip("this ggml does not know the type")
    start = data.ctypes.data
    refused = [n for n in range(count) if not judge(int(qtype), start + n * size, size)]
    capfd.readouterr()  # it says so on stderr, each time
    assert bad_qblocks(data, qtype).tolist() == refused
    assert refused or not SCALES.get(qtype.name, (1,))


def test_doubles() -> None:
    """(ggml also refuses those that single precision cannot hold.)"""
    values = np.array([0, 1e300, -np.inf, 5e-324, np.nan])
    assert bad_qblocks(values.view(np.uint8), TYPES.F64).tolist() == [2, 4]


@pytest.mark.parametrize("qtype", QUANTIZED, ids=lambda t: str(t.name))
def test_bad_scales_are_those_that_dequantize_to_nonsense(qtype: TYPES) -> None:
    """The gguf package as the judge, for the types that it dequantizes."""
    if not is_known(qtype) or qtype.name in ("MXFP4", "NVFP4"):
        pytest.skip("its bad scales do not make NaN, or there are none")
    count = 600
    data = random_qblocks(qtype, count, 1)
    try:
        with np.errstate(all="ignore"):
            values = quants.dequantize(data.reshape(count, -1), qtype)
    except (NotImplementedError, ValueError):
        pytest.skip("the gguf package does not dequantize it")
    finite = np.isfinite(values.reshape(count, -1)).all(axis=1)
    assert bad_qblocks(data, qtype).tolist() == np.flatnonzero(~finite).tolist()
    assert not finite.all()


# --- verify -----------------------------------------------------------------------------------


def read_back(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("piece", [1, 100, 1 << 19])
def test_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Of the very bytes, in the order of the file, however they are cut."""
    monkeypatch.setattr(stream, "PIECE", piece)
    path = write_model(tmp_path / "tiny.gguf")
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in read_back(path).items()}
    seen: list[int] = []
    checks = list(verify(inspect(path).tensors, seen.append, threads=2))
    assert {check.info.name: check.sha256 for check in checks} == expected
    assert [check.info.name for check in checks] == list(expected)
    assert sum(seen) == sum(map(len, read_back(path).values()))
    assert {check.bad for check in checks} == {0}
    assert {check.damage for check in checks} == {None}


def test_damage_is_counted_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 10 * 34)
    rows = np.zeros((40, 34), np.uint8)
    rows[[13, 14, 39], 1] = 0x7C  # infinity as F16
    floats = np.ones((5, 7), np.float32)
    floats[2, 3] = np.nan
    tensors: dict[str, Any] = {"q": (rows, TYPES.Q8_0), "f": floats, "i": np.full(9, -1, np.int32)}
    path = write_gguf(tmp_path / "x.gguf", "llama", {}, tensors)
    q, f, i = verify(inspect(path).tensors)
    assert (q.bad, q.first_bad) == (3, 13)
    assert q.damage == "3 qblocks have a NaN or infinite scale, the first at 13"
    assert f.damage == "1 values are NaN or infinite, the first at 17"
    assert (i.bad, i.damage) == (0, None)


def test_types_without_a_table_are_hashed_and_said_to_be_unchecked(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf", "llama", {}, {"t": (np.ones((1, 40), np.uint8), TYPES(9))}
    )
    (check,) = verify(inspect(path).tensors)
    assert (check.bad, check.damage) == (None, None)
    assert "Q8_1: scales not checked" in text.verify_text([check], {}, 40)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    tensors = inspect(path).tensors
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(OrthrusError, match="became shorter"):
        list(verify(tensors))
    path.unlink()
    with pytest.raises(OrthrusError, match="cannot be read: No such file"):
        list(verify(tensors))


def test_overall_digests_do_not_depend_on_the_packing(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf")
    twins = {t.name: t.data.copy() for t in gguf.GGUFReader(whole).tensors if "_diff" in t.name}
    base = write_model(tmp_path / "base.gguf", "qwen3")
    heads = write_heads(tmp_path / "heads.gguf", tensors=dict(reversed(twins.items())))
    base_tensors = {
        t.name: t.data.copy() for t in gguf.GGUFReader(whole).tensors if "_diff" not in t.name
    }
    base = write_model(tmp_path / "base2.gguf", "qwen3", tensors=base_tensors)
    one = overall(verify(inspect(whole).tensors))
    two = overall(verify(inspect(base, heads).tensors))
    assert dict(one) == dict(two)
    assert set(one) == {"base", "heads"}
    assert dict(overall(verify(inspect(heads).tensors))) == {"heads": one["heads"]}
    lines = [
        f"{t.name} F32 {','.join(map(str, t.data.shape))} "
        f"{hashlib.sha256(t.data.tobytes()).hexdigest()}\n"
        for t in gguf.GGUFReader(whole).tensors
        if "_diff" in t.name
    ]
    assert one["heads"] == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


# --- summary ----------------------------------------------------------------------------------


def test_counts_agree_with_the_gguf_package(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    tensors = gguf.GGUFReader(path).tensors
    summary = inspect(path).summary
    assert summary.total.tensors == len(tensors)
    assert summary.total.elements == sum(int(t.n_elements) for t in tensors)
    assert summary.total.n_bytes == sum(int(t.n_bytes) for t in tensors)
    assert summary.total.bits_per_weight == 32
    assert summary.heads.tensors == N_LAYERS * len(TWINS)
    assert summary.base.tensors == len(tensors) - summary.heads.tensors
    (layers, outside) = summary.by_layer
    assert layers.layers == tuple(range(N_LAYERS))
    assert layers.types == (("F32", len(LAYER) + len(TWINS)),)
    assert (outside.layers, outside.each.tensors) == ((), 2)


def test_layers_that_differ_are_kept_apart(tmp_path: Path) -> None:
    """Twelve layers in the order of a mix."""
    f16, f32 = np.ones((2, 4), np.float16), np.ones((2, 4), np.float32)
    halves = (2, 4, 5, 6, 11)
    tensors = {f"blk.{i}.a.weight": f16 if i in halves else f32 for i in range(12)}
    path = write_gguf(tmp_path / "x.gguf", "llama", {}, dict(reversed(tensors.items())))
    summary = inspect(path).summary
    one, two = summary.by_layer
    assert (one.layers, one.types) == ((0, 1, 3, 7, 8, 9, 10), (("F32", 1),))
    assert (two.layers, two.types) == (halves, (("F16", 1),))
    assert (one.each.n_bytes, two.each.n_bytes) == (32, 16)
    assert text.ranges(one.layers) == "0–1, 3, 7–10"
    assert text.ranges(halves) == "2, 4–6, 11"
    assert [name for name, _ in summary.by_type] == ["F32", "F16"]
    assert dict(summary.by_type)["F16"].bits_per_weight == 16


def test_names_that_only_look_like_layers() -> None:
    assert [layer_of(name) for name in ("blk.12.attn_q.weight", "blk.x.a", "blk.1", "blk.².a")] == [
        12,
        None,
        None,
        None,
    ]
    assert summarize([]).total.bits_per_weight is None


# --- diff -------------------------------------------------------------------------------------


def differences(first: Path, second: Path) -> tuple[Mapping[str, str], Mapping[str, str], bool]:
    with GGUFFile.open(first) as one, GGUFFile.open(second) as two:
        keys, tensors = diff_metadata(one, two), diff_tensors(one, two)
    return keys.different, tensors.different, keys.equal and tensors.equal


def test_a_model_equals_itself_in_another_order(tmp_path: Path) -> None:
    nan = {"a.nan": np.float32("nan"), "a.list": ["x"], "a.array": np.arange(3, dtype=np.int16)}
    tensors = {"t": np.ones(3, np.float32), "u": np.ones(5, np.float32)}
    one = write_gguf(tmp_path / "a.gguf", "llama", nan, tensors)
    two = write_gguf(
        tmp_path / "b.gguf", "llama", dict(reversed(nan.items())), dict(reversed(tensors.items()))
    )
    assert differences(one, two) == ({}, {}, True)


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (np.uint32(1), np.uint32(2), "1 and 2"),
        (np.uint32(1), np.bool_(True), "1 and True"),
        (np.uint32(1), np.float32(1), "1 and 1.0"),
        (np.uint32(1), "1", "1 and '1'"),
        (np.float32(0.0), np.float32(-0.0), "0.0 and -0.0"),
        ("short", "shirt", "'short' and 'shirt'"),
        ("a" * 50 + "x", "a" * 50, "from character 50: 'x' and ''"),
        (["a", "b"], ["a", "c"], "element 1: 'b' and 'c'"),
        (["a", "b"], ["a"], "an array of 2 strings and an array of 1 strings"),
        (np.arange(3), np.array([0, 7, 2]), "element 1: 1 and 7"),
        (np.arange(3), np.arange(3, dtype=np.int32), "array of 3 int64 and an array of 3 int32"),
        (np.arange(3), np.arange(4), "array of 3 int64 and an array of 4 int64"),
    ],
)
def test_values_that_differ(tmp_path: Path, one: Any, two: Any, expected: str) -> None:
    first = write_gguf(tmp_path / "a.gguf", "llama", {"k": one}, {})
    second = write_gguf(tmp_path / "b.gguf", "llama", {"k": two}, {})
    keys, tensors, equal = differences(first, second)
    assert expected in keys["k"]
    assert (len(keys), dict(tensors), equal) == (1, {}, False)


def test_tensors_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 64)
    data = np.arange(100, dtype=np.float32)
    changed = data.copy()
    changed.view(np.uint8)[[130, 131, 399]] ^= 1
    first: dict[str, Any] = {"bytes": data, "shape": data, "type": data, "gone": data, "same": data}
    second: dict[str, Any] = {
        "bytes": changed,
        "shape": data.reshape(10, 10),
        "type": data.view(np.int32),
        "same": data,
        "new": data,
    }
    one = write_gguf(tmp_path / "a.gguf", "llama", {}, first)
    two = write_gguf(tmp_path / "b.gguf", "llama", {}, second)
    with GGUFFile.open(one) as a, GGUFFile.open(two) as b:
        found = diff_tensors(a, b)
    assert found.different == {
        "bytes": "3 of 400 bytes differ, the first at 130",
        "shape": "F32 (100,) and F32 (10, 10)",
        "type": "F32 (100,) and I32 (100,)",
    }
    assert (found.same, found.only_first, found.only_second) == (("same",), ("gone",), ("new",))
    assert not found.equal


# --- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\nb\x1b[2J\u202e", "a\\nb\\x1b[2J\\u202e"),
        ("é" * 100, "é" * 59 + "…"),
        ("x" * 1000, "x" * 40 + "… (1,000 characters)"),
        (1e-6, "1e-06"),
        (float("nan"), "nan"),
        (True, "True"),
        (["a\x07", "b"], "2 strings: 'a\\x07', 'b'"),
        ([str(i) for i in range(9)], "9 strings: '0', '1', '2', '3', '4', '5', …"),
        (np.arange(3, dtype=np.uint8), "3 uint8: 0, 1, 2"),
        ([], "0 strings: "),
    ],
)
def test_values_on_a_line(value: Any, expected: str) -> None:
    assert text.value_text(value, 60) == expected


def test_values_as_json() -> None:
    assert value_json(float("inf")) == "inf"
    assert value_json(np.array([1.0, np.nan], np.float32)) == {
        "array": "float32",
        "length": 2,
        "first": [1.0, "nan"],
    }
    assert value_json([str(i) for i in range(20)])["first"] == [str(i) for i in range(8)]


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1 << 20, "1.0 MiB"),
        (5 << 30, "5.00 GiB"),
        (1 << 45, "32768.00 GiB"),
    ],
)
def test_sizes(n_bytes: int, expected: str) -> None:
    assert text.size(n_bytes) == expected
