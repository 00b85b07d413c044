"""Reading valid GGUF files, compared with the gguf package's own reader and with bytes by hand."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orthrus_gguf.gguf import cursor
from orthrus_gguf.gguf.reader import GGUFFile
from tests.gguf.builder import (
    BOOL,
    F32,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    array,
    build,
    entry,
    string,
    tensor,
    u64,
)
from tests.tiny_model import write_gguf, write_model

NUMBERS: list[tuple[int, str, int | float]] = [
    (UINT8, "<B", 255),
    (INT8, "<b", -128),
    (UINT16, "<H", 65535),
    (INT16, "<h", -32768),
    (UINT32, "<I", (1 << 32) - 1),
    (INT32, "<i", -(1 << 31)),
    (FLOAT32, "<f", 0.15625),
    (UINT64, "<Q", (1 << 64) - 1),
    (INT64, "<q", -(1 << 63)),
    (FLOAT64, "<d", 1e-300),
]


def opened(path: Path, content: bytes) -> GGUFFile:
    path.write_bytes(content)
    return GGUFFile.open(path)


@pytest.mark.parametrize(("kind", "layout", "number"), NUMBERS)
def test_number(tmp_path: Path, kind: int, layout: str, number: float) -> None:
    raw = struct.pack(layout, number)
    content = build([entry("one", kind, raw), array("many", kind, 3, raw * 3)])
    with opened(tmp_path / "x.gguf", content) as file:
        assert file.metadata["one"] == number
        assert type(file.metadata["one"]) is type(number)
        many = file.metadata["many"]
        assert isinstance(many, np.ndarray)
        assert many.dtype == np.dtype(layout)
        assert many.tolist() == [number] * 3
        assert not many.flags.writeable


def test_bools(tmp_path: Path) -> None:
    content = build(
        [entry("yes", BOOL, b"\1"), entry("no", BOOL, b"\0"), array("many", BOOL, 3, b"\1\0\1")]
    )
    with opened(tmp_path / "x.gguf", content) as file:
        assert file.metadata["yes"] is True
        assert file.metadata["no"] is False
        many = file.metadata["many"]
        assert isinstance(many, np.ndarray)
        assert many.dtype == np.bool_
        assert many.tolist() == [True, False, True]


def test_strings(tmp_path: Path) -> None:
    texts = ["", "a", "é日本語🐍", "\0nul\0", "x" * 300, "y" * 70_000, "\n"]
    content = build(
        [
            array("texts", STRING, len(texts), b"".join(map(string, texts))),
            entry("text", STRING, string("é日本語")),
            array("none", STRING, 0, b""),
            array("no numbers", UINT32, 0, b""),
        ]
    )
    with opened(tmp_path / "x.gguf", content) as file:
        assert file.metadata["texts"] == texts
        assert file.metadata["text"] == "é日本語"
        assert file.metadata["none"] == []
        empty = file.metadata["no numbers"]
        assert isinstance(empty, np.ndarray)
        assert empty.shape == (0,)


def test_strings_across_the_parts_that_are_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [chr(0x61 + i % 26) * (i * 7 % 23) + "é" * (i % 3) for i in range(200)]
    content = build([array("texts", STRING, len(texts), b"".join(map(string, texts)))])
    for part in range(1, 70):
        monkeypatch.setattr(cursor, "PART", part)
        with opened(tmp_path / "x.gguf", content) as file:
            assert file.metadata["texts"] == texts


def test_prefetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads of all the tensors named, of each 64 KiB at least once, and of nothing else."""
    big = np.zeros((50, 1000), np.float32)
    small = np.zeros(8, np.float32)
    path = write_model(tmp_path / "x.gguf", tensors={"a": big, "b": small, "c": big})
    with GGUFFile.open(path) as file:
        read: Queue[NDArray[np.int64]] = Queue()
        monkeypatch.setattr(file, "_bytes", SimpleNamespace(take=read.put))
        file.prefetch(["a", "b"])
        spots = read.get(timeout=10)
        a, b = file.tensors["a"], file.tensors["b"]
        assert set(spots) >= {a.offset, b.offset}
        assert spots.max() < b.offset + b.n_bytes
        assert np.diff(spots).max() <= 1 << 16
        with pytest.raises(KeyError):
            file.prefetch(["nothing"])
    with pytest.raises(ValueError, match="is closed"):
        file.prefetch(["a"])


def test_same_as_the_gguf_package(tmp_path: Path) -> None:
    """Every key and tensor of a whole model, with several tensor types, byte for byte."""
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((4, 64), np.float32)
    tensors: dict[str, Any] = {
        "f32.4d": rng.standard_normal((2, 3, 4, 5), np.float32),
        "f16": weights.astype(np.float16),
        "one": np.ones(1, np.float32),
        "i32": np.arange(7, dtype=np.int32),
    }
    for kind in (kinds.BF16, kinds.Q8_0, kinds.Q4_0, kinds.Q5_1):
        tensors[kind.name] = (gguf.quantize(weights, kind), kind)
    tensors["Q6_K"] = (rng.integers(0, 256, (3, 210 * 2), np.uint8), kinds.Q6_K)
    path = write_model(
        tmp_path / "x.gguf", tensors=tensors, metadata={"odd": np.array([1.5, -2.0], np.float64)}
    )
    theirs = gguf.GGUFReader(path)
    with GGUFFile.open(path) as ours:
        assert ours.version == 3
        keys = [name for name in theirs.fields if not name.startswith("GGUF.")]
        assert list(ours.metadata) == keys
        for key in keys:
            value, expected = ours.metadata[key], theirs.fields[key].contents()
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            info = ours.tensors[t.name]
            assert info.name == t.name
            assert info.shape == tuple(reversed(t.shape.tolist()))
            assert info.type == t.tensor_type
            assert info.offset == t.data_offset
            assert info.n_bytes == t.n_bytes
            assert ours.data(t.name).tobytes() == t.data.tobytes()


def test_numpy_order_of_shapes(tmp_path: Path) -> None:
    """Columns come first in the file, last in numpy."""
    content = build([], [tensor("t", [2, 3])], np.arange(6, dtype="<f4").tobytes())
    with opened(tmp_path / "x.gguf", content) as file:
        assert file.tensors["t"].shape == (3, 2)
        assert file.data("t").view("<f4").reshape(3, 2)[1].tolist() == [2, 3]


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    first, second = bytes(range(12)), bytes(range(100, 108))
    gap = -(-12 // alignment) * alignment
    content = build(
        [entry("general.alignment", UINT32, struct.pack("<I", alignment))],
        [tensor("first", [3]), tensor("second", [2], F32, gap)],
        first.ljust(gap, b"\0") + second,
        alignment=alignment,
    )
    with opened(tmp_path / "x.gguf", content) as file:
        assert file.alignment == alignment
        assert file.data("first").tobytes() == first
        assert file.data("second").tobytes() == second
        assert file.tensors["second"].offset % alignment == 0


def test_version_2(tmp_path: Path) -> None:
    with opened(tmp_path / "x.gguf", build([entry("k", UINT8, b"\7")], version=2)) as file:
        assert file.version == 2
        assert file.metadata == {"k": 7}


def test_nothing_inside(tmp_path: Path) -> None:
    with opened(tmp_path / "x.gguf", build()) as file:
        assert not file.metadata
        assert not file.tensors
        assert file.alignment == 32


def test_bytes_after_the_last_tensor_are_harmless(tmp_path: Path) -> None:
    with opened(
        tmp_path / "x.gguf", build([], [tensor("t", [1])], b"\1\2\3\4" + b"?" * 99)
    ) as file:
        assert file.data("t").tolist() == [1, 2, 3, 4]


def test_longest_names(tmp_path: Path) -> None:
    key, name = "k" * 65535, "n" * 63
    content = build([entry(key, UINT64, u64(1))], [tensor(name, [1, 1, 1, 1])], b"\0" * 4)
    with opened(tmp_path / "x.gguf", content) as file:
        assert list(file.metadata) == [key]
        assert file.tensors[name].shape == (1, 1, 1, 1)


def test_data_is_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "orthrus", {}, {"t": np.ones((64, 64), np.float32)})
    with GGUFFile.open(path) as file:
        view = file.data("t")
        assert view.dtype == np.uint8
        assert view.shape == (64 * 64 * 4,)
        assert not view.flags.writeable
        assert np.shares_memory(view, file.data("t"))
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(KeyError):
            file.data("no such tensor")
    assert view.view("<f4").sum() == 64 * 64, "a view outlives close()"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_mapping_ends_with_the_last_view(tmp_path: Path) -> None:
    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    path = write_gguf(tmp_path / "x.gguf", "orthrus", {}, {"t": np.ones(64, np.float32)})
    file = GGUFFile.open(path)
    view = file.data("t")
    file.close()
    assert mapped()
    del view
    assert not mapped()


def test_closed(tmp_path: Path) -> None:
    file = opened(tmp_path / "x.gguf", build([], [tensor("t", [1])], b"\0" * 4))
    file.close()
    file.close()
    with pytest.raises(ValueError, match=r"x\.gguf is closed"):
        file.data("t")


def test_contents_cannot_be_changed(tmp_path: Path) -> None:
    with opened(tmp_path / "x.gguf", build([entry("k", UINT8, b"\1")])) as file:
        with pytest.raises(TypeError):
            file.metadata["k"] = 2  # type: ignore[index]
        with pytest.raises(TypeError):
            del file.tensors["k"]  # type: ignore[attr-defined]


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.one_of(
    TEXT,
    st.lists(TEXT, min_size=1, max_size=5),
    st.booleans().map(np.bool_),
    st.integers(-(1 << 63), (1 << 63) - 1).map(np.int64),
    st.integers(0, 255).map(np.uint8),
    st.floats(width=32, allow_nan=False).map(np.float32),
    st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=9).map(
        lambda numbers: np.array(numbers, np.uint32)
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT.filter(bool), VALUES, max_size=8))
def test_any_metadata(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> None:
    """Whatever the gguf package writes is read back, in order."""
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    metadata = {key: value for key, value in metadata.items() if key != "general.alignment"}
    with GGUFFile.open(write_gguf(path, "orthrus", metadata, {})) as file:
        assert list(file.metadata) == ["general.architecture", *metadata]
        for key, value in metadata.items():
            np.testing.assert_array_equal(np.asarray(file.metadata[key]), np.asarray(value))
