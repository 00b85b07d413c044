"""Both formats of importance matrices, against libgguf's reader, and damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
from damage import check_refusal
from imatrix_files import random_importance, write_dat, write_gguf
from orthrus_converters.imatrix import read_imatrix

from orthrus_gguf.errors import OrthrusError

VALUES = random_importance({"blk.0.attn_q.weight": (4, 64), "blk.1.ffn_down.weight": (4, 96)})


@pytest.mark.parametrize("dataset", ["text.txt", "", None])
def test_dat(dataset: str | None, tmp_path: Path) -> None:
    write_dat(tmp_path / "im.dat", VALUES, n_calls=7, dataset=dataset)
    found = read_imatrix(tmp_path / "im.dat")
    expected = libgguf.load_imatrix(tmp_path / "im.dat")
    assert found.values.keys() == expected.keys() == VALUES.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found.values[name], values)
    assert found.datasets == (() if dataset is None else (dataset,))
    assert found.n_chunks == (0 if dataset is None else 7)


@pytest.mark.parametrize("count", [3.0, 0.0])
def test_gguf(count: float, tmp_path: Path) -> None:
    """A count of 0 means that nothing was measured: all columns are alike."""
    write_gguf(tmp_path / "im.gguf", VALUES, count)
    found = read_imatrix(tmp_path / "im.gguf")
    expected = libgguf.load_imatrix(tmp_path / "im.gguf")
    assert found.values.keys() == expected.keys() == VALUES.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found.values[name], values)
        assert count or (values == 1).all()
    assert (found.datasets, found.n_chunks) == (("x.txt",), 7)


def test_twins_share_what_they_do_not_have(tmp_path: Path) -> None:
    write_dat(tmp_path / "im.dat", {**VALUES, "token_embd.weight": np.ones(5, np.float32)})
    imatrix = read_imatrix(tmp_path / "im.dat")
    own, twin = (imatrix.find(f"blk.0.attn_q{part}.weight", 64) for part in ("", "_diff"))
    assert own is twin is not None
    assert imatrix.find("blk.0.attn_k_diff.weight", 64) is None
    assert imatrix.find("token_embd.weight", 64) is None  # of another size, as llama-imatrix's is
    with pytest.raises(OrthrusError, match=r"64 values for blk\.0\.attn_q\.weight, expected 65"):
        imatrix.find("blk.0.attn_q.weight", 65)


def dat(*parts: int | bytes) -> bytes:
    return b"".join(struct.pack("<i", part) if isinstance(part, int) else part for part in parts)


FLOATS = np.ones(2, "<f4").tobytes()
DAMAGED = {
    "empty": b"",
    "short": b"\1\0",
    "no entries": dat(0),
    "negative count": dat(-1),
    "huge count": dat(2**31 - 1, 1, b"a", 1, 2, FLOATS),
    "negative name": dat(1, -5, b"a"),
    "huge name": dat(1, 2**31 - 1, b"a"),
    "negative values": dat(1, 1, b"a", 1, -2, FLOATS),
    "no values": dat(1, 1, b"a", 1, 0),
    "huge values": dat(1, 1, b"a", 1, 2**31 - 1, FLOATS),
    "cut": dat(2, 1, b"a", 1, 2, FLOATS),
    "not finite": dat(1, 1, b"a", 1, 1, np.float32(np.nan).tobytes()),
    "negative importance": dat(1, 1, b"a", 1, 1, np.float32(-1).tobytes()),
    "long dataset": dat(1, 1, b"a", 1, 2, FLOATS, 3, 2**31 - 1),
    "a model": b"GGUF" + bytes(20),
    "text": b"importance, please\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tiny: Path, tmp_path: Path, convert: Callable[..., Any]) -> None:
    path = tmp_path / "im.dat"
    path.write_bytes(DAMAGED[name])
    check_refusal(convert(tiny, "--type", "q4_0", "--imatrix", str(path)), "im.dat: ")


def test_every_truncation(tmp_path: Path) -> None:
    write_dat(tmp_path / "im.dat", VALUES, dataset=None)
    data = (tmp_path / "im.dat").read_bytes()
    for length in range(0, len(data), 5):
        (tmp_path / "cut.dat").write_bytes(data[:length])
        with pytest.raises(OrthrusError, match=r"cut\.dat: "):
            read_imatrix(tmp_path / "cut.dat")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.kv_data[0].pop("general.type"), "expected an imatrix"),
        (lambda w: w.tensors[0].pop("a.counts"), "expected a.counts in F32"),
        (lambda w: w.add_tensor("b.in_sum2", np.ones((1, 4), np.float16)), "b.in_sum2 in F32"),
        (
            lambda w: (
                w.add_tensor("b.in_sum2", np.ones(4, np.float32))
                or w.add_tensor("b.counts", np.ones(3, np.float32))
            ),
            "b has 4 sums for 3 counts",
        ),
        (
            lambda w: (
                w.add_tensor("b.in_sum2", np.full(4, np.inf, np.float32))
                or w.add_tensor("b.counts", np.ones(1, np.float32))
            ),
            "the importance for b is negative or not finite",
        ),
        (lambda w: w.tensors[0].clear(), "is no imatrix, or empty"),
    ],
)
def test_damaged_gguf(
    change: Callable[[gguf.GGUFWriter], object], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "im.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_tensor("a.in_sum2", np.ones((1, 4), np.float32))
    writer.add_tensor("a.counts", np.ones((1, 1), np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(OrthrusError, match=r"im\.gguf: ") as error:
        read_imatrix(path)
    assert expected in str(error.value)


def test_of_another_model(tiny: Path, tmp_path: Path, convert: Callable[..., Any]) -> None:
    write_dat(tmp_path / "im.dat", VALUES)
    refused = convert(tiny, "--type", "q4_0", "--imatrix", str(tmp_path / "im.dat"))
    assert refused.code == 0  # 64 and 96 columns, as in the model
    write_dat(tmp_path / "im.dat", random_importance({"blk.1.ffn_up.weight": (1, 32)}))
    refused = convert(tiny, "--type", "q4_0", "--imatrix", str(tmp_path / "im.dat"), "--overwrite")
    assert "has 32 values for blk.1.ffn_up.weight, expected 64" in refused.stderr


def test_an_imatrix_that_is_not_used(
    tiny: Path, tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    write_dat(tmp_path / "im.dat", VALUES)
    run = convert(tiny, "--type", "f16", "--imatrix", str(tmp_path / "im.dat"))
    assert "im.dat: was not used" in run.stderr
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert not any("imatrix" in key for key in fields)


def test_output_that_is_the_imatrix(tiny: Path, convert: Callable[..., Any], out: Path) -> None:
    write_dat(out / "model.gguf", VALUES)
    before = (out / "model.gguf").read_bytes()
    run = convert(tiny, "--imatrix", str(out / "model.gguf"), "--overwrite", "--type", "q4_0")
    assert run.code == 1
    assert "is an input of this conversion" in run.stderr
    assert (out / "model.gguf").read_bytes() == before
