"""Broken GGUF files: each mistake gives its own one-line error, nothing else happens."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.model.file import ModelFile
from tests.gguf.builder import (
    ARRAY,
    BOOL,
    F32,
    FLOAT32,
    INT32,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    array,
    build,
    entry,
    string,
    tensor,
    u32,
    u64,
)
from tests.tiny_model import write_model

HUGE = (1 << 64) - 1
ONE = entry("some.key", UINT32, u32(1))
NAMES = ["first", "second"]


def two_tensors(second: bytes, *, data: int = 96) -> bytes:
    """A file whose first tensor is fine (32 bytes of data, so the next belongs at 32)."""
    return build([], [tensor("first", [8]), second], b"\0" * data)


HEADER = {
    "bad magic": (build(magic=b"GGUX"), "is not a GGUF file: expected .* found b'GGUX'"),
    "other format": (b"PK\3\4" + b"\0" * 100, "is not a GGUF file"),
    "shorter than the magic": (b"GG", "is not a GGUF file"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "version 0": (build(version=0), "version 0, expected 2 or 3"),
    "version 1": (build(version=1), "version 1, which is no longer supported"),
    "future version": (build(version=4), "version 4, expected 2 or 3; update"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "nothing after the version": (build()[:8], "number of tensors needs 8 bytes"),
    "absurd n_tensors": (build(n_tensors=HUGE), f"claims {HUGE} tensors"),
    "absurd n_kv": (build(n_entries=HUGE), f"claims {HUGE} metadata entries"),
    "too many for the size": (
        build([ONE], n_entries=5),
        "claims 5 metadata entries, more than fit",
    ),
    "too many metadata entries": (
        build(data=bytes(1 << 20), n_entries=65537),
        "claims 65537 metadata entries, expected at most 65536",
    ),
    "too many tensors": (
        build(data=bytes(3 << 20), n_tensors=65537),
        "claims 65537 tensors, expected at most 65536",
    ),
}

METADATA = {
    "key longer than the file": (
        build([string("abc", length=1 << 12) + u32(UINT8) + b"1"]),
        "key of metadata entry 0 needs 4096 bytes",
    ),
    "key longer than allowed": (
        build([string("k" * 65536) + u32(UINT8) + b"1"]),
        "key of metadata entry 0 is 65536 bytes long, expected at most 65535",
    ),
    "absurd key length": (build([string("abc", length=HUGE) + b"\0" * 64]), f"is {HUGE} bytes"),
    "empty key": (build([entry("", UINT32, u32(1))]), "metadata entry 0 has an empty key"),
    "key not UTF-8": (build([entry(b"\xff\xfe", UINT32, u32(1))]), "entry 0 is not valid UTF-8"),
    "unknown type": (build([entry("k", 13, u64(0))]), "metadata key 'k' has the unknown type 13"),
    "duplicate key": (build([ONE, ONE]), "'some.key' occurs twice"),
    "bool that is neither": (build([entry("k", BOOL, b"\2")]), "expected a bool .* found 2"),
    "bools that are neither": (
        build([array("k", BOOL, 3, b"\0\1\7")]),
        "expected bools .* found 7",
    ),
    "string not UTF-8": (build([entry("k", STRING, string(b"\xc3("))]), "'k' is not valid UTF-8"),
    "string past the end": (
        build([entry("k", STRING, string("abc", length=1000))]),
        "'k' needs 1000 bytes",
    ),
    "absurd string": (build([entry("k", STRING, string("abc", length=HUGE))]), f"is {HUGE} bytes"),
    "array past the end": (
        build([array("k", UINT32, 1000, u32(1))]),
        "'k' has 1000 elements of at least 4 bytes",
    ),
    "absurd array": (build([array("k", UINT8, HUGE, b"1")]), f"'k' has {HUGE} elements"),
    "more elements than anything has": (
        build([array("k", UINT8, (1 << 24) + 1, bytes((1 << 24) + 1))]),
        "'k' has 16777217 elements, expected at most 16777216",
    ),
    "array whose byte count overflows": (
        build([array("k", UINT64, (1 << 61) + 1, u64(1))]),
        "elements of at least 8 bytes",
    ),
    "absurd array of strings": (
        build([array("k", STRING, HUGE, string("a"))]),
        f"'k' has {HUGE} elements of at least 8 bytes",
    ),
    "array of strings that ends early": (
        build([array("k", STRING, 3, string("a" * 40) + string("b"))], alignment=1),
        "'k' ends in the middle of string 2 of 3",
    ),
    "string in an array past the end": (
        build([array("k", STRING, 2, string("a") + string("b", length=HUGE))]),
        "string 1 of array at metadata key 'k' ends at",
    ),
    "string in an array not UTF-8": (
        build([array("k", STRING, 2, string("a") + string(b"\x80"))]),
        "string 1 of array at metadata key 'k' is not valid UTF-8",
    ),
    "array of unknown type": (build([array("k", 99, 1, u64(0))]), "has the unknown type 99"),
    "nested arrays": (
        build([array("k", ARRAY, 1, u32(UINT8) + u64(1) + b"1")]),
        "'k' holds arrays; nested arrays are not supported",
    ),
    "deeply nested arrays": (
        build([array("k", ARRAY, 1, (u32(ARRAY) + u64(1)) * 50_000)]),
        "nested arrays are not supported",
    ),
    "alignment of the wrong type": (
        build([entry("general.alignment", STRING, string("32"))]),
        "general.alignment: expected an integer, found a str",
    ),
    "alignment as a bool": (
        build([entry("general.alignment", BOOL, b"\1")]),
        "general.alignment: expected an integer, found a bool",
    ),
    "alignment as a float": (
        build([entry("general.alignment", FLOAT32, struct.pack("<f", 32))]),
        "general.alignment: expected an integer, found a float",
    ),
    "alignment 0": (
        build([entry("general.alignment", UINT32, u32(0))]),
        "general.alignment: expected a power of 2, found 0",
    ),
    "negative alignment": (
        build([entry("general.alignment", INT32, struct.pack("<i", -32))]),
        "general.alignment: expected a power of 2, found -32",
    ),
    "alignment no power of 2": (
        build([entry("general.alignment", UINT32, u32(24))]),
        "expected a power of 2, found 24",
    ),
}

TENSORS = {
    "name of 64 bytes": (
        build([], [tensor("n" * 64, [8])], b"\0" * 32),
        "name of tensor 0 is 64 bytes long, expected at most 63",
    ),
    "absurd name": (
        build([], [string("n", length=HUGE) + b"\0" * 64]),
        f"name of tensor 0 is {HUGE} bytes long",
    ),
    "empty name": (build([], [tensor("", [8])], b"\0" * 32), "tensor 0 has an empty name"),
    "name not UTF-8": (build([], [tensor(b"\xff", [8])], b"\0" * 32), "tensor 0 is not valid UTF"),
    "no dimensions": (
        build([], [tensor("t", [])], b"\0" * 64),
        "'t': expected 1 to 4 dimensions, found 0",
    ),
    "5 dimensions": (
        build([], [tensor("t", [1] * 5)], b"\0" * 64),
        "'t': expected 1 to 4 dimensions, found 5",
    ),
    "absurd number of dimensions": (
        build([], [tensor("t", [8], n_dims=(1 << 32) - 1)], b"\0" * 64),
        "'t': expected 1 to 4 dimensions, found 4294967295",
    ),
    "zero dimension": (
        build([], [tensor("t", [8, 0])], b"\0" * 64),
        r"'t': expected positive dimensions, found \(0, 8\)",
    ),
    "negative dimension": (
        build([], [tensor("t", [-8, 4])], b"\0" * 64),
        r"'t': expected positive dimensions, found \(4, -8\)",
    ),
    "element count overflows": (
        build([], [tensor("t", [1 << 32, 1 << 32])], b"\0" * 64),
        "'t': .* overflows a 64-bit count of elements",
    ),
    "byte count overflows": (
        build([], [tensor("t", [1 << 31, 1 << 31])], b"\0" * 64),
        "'t': .* overflows a 64-bit byte count",
    ),
    "unknown type": (
        build([], [tensor("t", [8], 999)], b"\0" * 64),
        "'t' has the unknown type 999, perhaps one of ik_llama.cpp's own; get the model in a type",
    ),
    "unknown new type": (
        build([], [tensor("t", [32], 77)], b"\0" * 64),
        "'t' has the unknown type 77; update the gguf package",
    ),
    "old type": (
        build([], [tensor("t", [32], 4)], b"\0" * 64),
        "'t' has the type Q4_2 .4., which ggml has given up; get the model as Q4_0",
    ),
    "removed type": (
        build([], [tensor("t", [32], 33)], b"\0" * 64),
        "'t' has the type Q4_0_8_8 .33., which ggml has given up; get the model as Q4_0",
    ),
    "row no multiple of the qblock": (
        build([], [tensor("t", [33], Q8_0)], b"\0" * 64),
        "'t': rows of 33 are no multiple of Q8_0's 32",
    ),
    "duplicate name": (two_tensors(tensor("first", [8], F32, 32)), "'first' occurs twice"),
    "misaligned offset": (
        two_tensors(tensor("second", [8], F32, 36)),
        "'second': offset 36 is no multiple of 32",
    ),
    "overlapping offset": (
        two_tensors(tensor("second", [8], F32, 0)),
        "'second' overlaps the one before: expected offset 32, found 0",
    ),
    "gap": (
        two_tensors(tensor("second", [8], F32, 64)),
        "'second' leaves a gap: expected offset 32, found 64",
    ),
    "absurd offset": (
        two_tensors(tensor("second", [8], F32, HUGE - 31)),
        "'second' leaves a gap",
    ),
    "alignment beyond the file": (
        build([entry("general.alignment", UINT64, u64(1 << 63))], [tensor("t", [8])], bytes(32)),
        "'t' ends at byte 9223372036854775840, the file at",
    ),
    "data past the end": (
        two_tensors(tensor("second", [8], F32, 32), data=63),
        "'second' ends at byte .*, the file at",
    ),
    "no data at all": (build([], [tensor("t", [1 << 20])]), "'t' ends at byte .*, the file at"),
}


def read_error(path: Path, content: bytes) -> str:
    """The message that opening a file with this content gives."""
    path.write_bytes(content)
    with pytest.raises(OrthrusError) as caught:
        GGUFFile.open(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(*case, id=name)
        for table in (HEADER, METADATA, TENSORS)
        for name, case in table.items()
    ],
)
def test_mistake(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(OrthrusError, match=message) as caught:
        GGUFFile.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))
    assert peak < 4 << 20


def test_all_messages_differ(tmp_path: Path) -> None:
    """One mistake, one message: nobody should have to guess which of two it was."""
    path = tmp_path / "bad.gguf"
    cases = {**HEADER, **METADATA, **TENSORS}
    alike = {"other format", "shorter than the magic", "deeply nested arrays"}
    messages = [
        read_error(path, content) for name, (content, _) in cases.items() if name not in alike
    ]
    assert len(set(messages)) == len(messages)


def test_control_characters_in_names_stay_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    evil = "a\nb\x1b[2J" * 100
    assert "\n" not in read_error(path, build([entry(evil, 77, b"")]))
    assert "\x1b" not in read_error(path, build([entry(evil, 77, b"")]))
    assert "\n" not in read_error(path, build([], [tensor("a\nb", [0])], b"\0" * 64))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(OrthrusError, match=r"nothing\.gguf: no such file"):
        GGUFFile.open(tmp_path / "nothing.gguf")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(OrthrusError, match="found a folder"):
        GGUFFile.open(tmp_path)


def test_special_file() -> None:
    with pytest.raises(OrthrusError, match="found a special file"):
        GGUFFile.open("/dev/null")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.touch()
    with pytest.raises(OrthrusError, match="the file is empty"):
        GGUFFile.open(path)


def test_name_too_long_for_the_system(tmp_path: Path) -> None:
    with pytest.raises(OrthrusError, match="cannot be read: File name too long"):
        GGUFFile.open(tmp_path / ("x" * 1000))


def test_every_truncation(tmp_path: Path) -> None:
    """Cut anywhere, the file is refused; cut after the last tensor byte, it is whole."""
    whole = build(
        [
            ONE,
            array("names", STRING, 2, string("a") + string("bc")),
            entry("s", STRING, string("x")),
        ],
        [tensor("first", [8]), tensor("second", [32], Q8_0, 32)],
        bytes(66),
    )
    path = tmp_path / "cut.gguf"
    for size in range(1, len(whole)):
        assert "cut.gguf: " in read_error(path, whole[:size])
    path.write_bytes(whole)
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == NAMES


@pytest.mark.parametrize("size", [1, 4])
def test_memory_is_a_small_multiple_of_the_file(tmp_path: Path, size: int) -> None:
    """The worst case: a large array of the shortest strings, each an object of its own."""
    texts = [chr(0x4E00 + i % 20_000) * size for i in range(100_000)]
    payload = b"".join(map(string, texts))
    path = tmp_path / "strings.gguf"
    path.write_bytes(build([array("k", STRING, len(texts), payload)]))
    tracemalloc.start()
    with GGUFFile.open(path) as file:
        peak = tracemalloc.get_traced_memory()[1]
        assert file.metadata["k"] == texts
    tracemalloc.stop()
    assert peak < 12 * path.stat().st_size


def test_the_most_entries_that_are_allowed(tmp_path: Path) -> None:
    """65,536 keys and as many tensors, in time linear in their number."""
    keys = [entry(f"k{i}", UINT8, b"\1") for i in range(1 << 16)]
    tensors = [tensor(f"t{i}", [8], F32, 32 * i) for i in range(1 << 16)]
    path = tmp_path / "many.gguf"
    path.write_bytes(build(keys, tensors, bytes(32 << 16)))
    start = time.process_time()
    with GGUFFile.open(path) as file:
        assert (len(file.metadata), len(file.tensors)) == (1 << 16, 1 << 16)
    assert time.process_time() - start < 15  # quadratic work would take hours


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip bytes, write extreme numbers, cut or duplicate a piece; mostly in the header."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(changed))
        kind = rng.randrange(6)
        if kind <= 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            number = rng.choice((0, 1, 13, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, HUGE))
            changed[at : at + 8] = u64(number)[: len(changed) - at]
        elif kind == 4:
            del changed[at : at + rng.randrange(1, 40)]
        else:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_mutations_give_a_model_or_an_error(tmp_path: Path, seed: int) -> None:
    """Thousands of damaged models: each opens or raises OrthrusError, within little memory."""
    path = tmp_path / "model.gguf"
    write_model(path)
    content = path.read_bytes()
    with GGUFFile.open(path) as file:
        data_start = min(info.offset for info in file.tensors.values())
    head, data = content[:data_start], content[data_start:]
    rng = random.Random(seed)
    outcomes = {"opened": 0, "refused": 0}
    tracemalloc.start()
    for _ in range(1000):
        path.write_bytes(mutate(head, rng) + (data if rng.random() < 0.9 else b""))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            with ModelFile.open(path) as model:
                assert all(model.data(name).size for name in model.tensors)
            outcomes["opened"] += 1
        except OrthrusError:
            outcomes["refused"] += 1
        assert tracemalloc.get_traced_memory()[1] - before < 8 << 20
    tracemalloc.stop()
    assert outcomes["opened"] > 20
    assert outcomes["refused"] > 400
