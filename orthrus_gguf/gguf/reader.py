"""Read GGUF files: metadata parsed once, tensor data mapped and never copied.

Written against the specification (docs/gguf.md in ggml) and the rules of llama.cpp's own loader.
Files come from strangers: whatever the bytes are, opening one either succeeds or raises
OrthrusError, in time and memory linear in the size of the metadata.
"""

from __future__ import annotations

import math
import mmap
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.gguf.closing import Closing
from orthrus_gguf.gguf.cursor import Cursor, map_file
from orthrus_gguf.records import dataclass

#: A metadata value. Arrays of strings are lists; arrays of numbers or bools are read-only numpy
#: arrays of the element type in the file.
Value = bool | int | float | str | list[str] | NDArray[Any]

#: The type of a metadata value, and for arrays that of their items.
ValueTypes = tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

MAX_KEY = 65535  # bytes, from the specification
MAX_TENSOR_NAME = 63  # bytes: GGML_MAX_NAME without its terminator
MAX_DIMS = 4
MAX_ENTRIES = 1 << 16  # far above any real count of tensors or keys
MAX_INT64 = (1 << 63) - 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_I64 = struct.Struct("<q")

#: Types that ggml had once: what they were called, and what to get instead.
_REMOVED = {
    4: ("Q4_2", "Q4_0"),
    5: ("Q4_3", "Q4_1"),
    31: ("Q4_0_4_4", "Q4_0"),
    32: ("Q4_0_4_8", "Q4_0"),
    33: ("Q4_0_8_8", "Q4_0"),
    36: ("IQ4_NL_4_4", "IQ4_NL"),
    37: ("IQ4_NL_4_8", "IQ4_NL"),
    38: ("IQ4_NL_8_8", "IQ4_NL"),
}
#: From here on, forks of ggml number types of their own (ik_llama.cpp).
_FOREIGN = 96

#: Distance in bytes of the reads that bring a mapped file into memory. Linux maps the 64 KiB around
#: each; where it is less, what was not touched comes when it is used, as it would anyway.
_PREFETCHED = 1 << 16

# The shortest possible entries: they bound the counts in the header by the size of the file.
_MIN_KEY_VALUE = 8 + 1 + 4 + 1  # key length, key, type, value
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, n_dims, one dimension, type, offset

_TYPES = gguf.GGUFValueType
_SCALARS = {
    _TYPES.UINT8: struct.Struct("<B"),
    _TYPES.INT8: struct.Struct("<b"),
    _TYPES.UINT16: struct.Struct("<H"),
    _TYPES.INT16: struct.Struct("<h"),
    _TYPES.UINT32: _U32,
    _TYPES.INT32: struct.Struct("<i"),
    _TYPES.FLOAT32: struct.Struct("<f"),
    _TYPES.BOOL: struct.Struct("<B"),
    _TYPES.UINT64: _U64,
    _TYPES.INT64: _I64,
    _TYPES.FLOAT64: struct.Struct("<d"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file.

    shape: numpy order, rows first: (rows, columns), i.e. the file's dimensions reversed.
    offset: of the first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    n_bytes: int


class GGUFFile(Closing):
    """An open GGUF file (version 2 or 3, little-endian). Use as a context manager, or close it.

    types: of the metadata's values; of an array, also that of its items. paths: of all files, were
    it split into several (see `parts.py`); `path` is the first.
    """

    def __init__(
        self,
        path: Path,
        buffer: mmap.mmap,
        version: int,
        alignment: int,
        metadata: Mapping[str, Value],
        types: Mapping[str, ValueTypes],
        tensors: Mapping[str, TensorInfo],
    ) -> None:
        self.path = path
        self.paths: tuple[Path, ...] = (path,)
        self.n_bytes = len(buffer)  # of the whole file
        self.version = version
        self.alignment = alignment
        self.metadata = metadata
        self.types = types
        self.tensors = tensors
        self._mapping: mmap.mmap | None = buffer
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(buffer, np.uint8)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map the file and parse everything but the tensor data.

        Raises OrthrusError if it cannot be read or breaks a rule of the format.
        """
        path = Path(path)
        cursor = Cursor(map_file(path), path)
        version, n_tensors, n_metadata = _read_header(cursor)
        metadata, types = _read_metadata(cursor, n_metadata)
        alignment = _alignment(cursor, metadata)
        tensors = _read_tensors(cursor, n_tensors, alignment)
        return cls(
            path,
            cursor.buffer,
            version,
            alignment,
            MappingProxyType(metadata),
            MappingProxyType(types),
            MappingProxyType(tensors),
        )

    def path_of(self, name: str) -> Path:
        """The file that holds tensor `name`, in which its offset counts. Raises KeyError."""
        self.tensors[name]
        return self.path

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of tensor `name`, shape (n_bytes,): a read-only view of the mapped file.

        Views stay valid after close(). Raises KeyError if there is no such tensor.
        """
        info = self.tensors[name]
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        return self._bytes[info.offset : info.offset + info.n_bytes]

    def prefetch(self, names: Iterable[str]) -> None:
        """Bring the data of these tensors into memory, in the background.

        For what is in the system's cache this sets up the mapping only; what is not is read from
        the disk. Raises KeyError if there is no such tensor.
        """
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        infos = [self.tensors[name] for name in names]
        spots = [range(info.offset, info.offset + info.n_bytes, _PREFETCHED) for info in infos]
        # One call for all, during which other threads run.
        task = partial(self._bytes.take, np.fromiter(chain.from_iterable(spots), np.int64))
        threading.Thread(target=task, name="prefetch", daemon=True).start()

    def release(self, name: str) -> None:
        """Let the system have the memory of a tensor's data; reading it again brings it back."""
        mapping = self._mapping  # which another thread may let go of meanwhile
        if mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        info, page = self.tensors[name], mmap.PAGESIZE
        first = -(-info.offset // page) * page
        size = (info.offset + info.n_bytes) // page * page - first
        if size > 0:
            mapping.madvise(mmap.MADV_DONTNEED, first, size)

    def close(self) -> None:
        """Let go of the mapping. It ends with the last view that data() has handed out."""
        self._bytes = self._mapping = None


def _read_header(cursor: Cursor) -> tuple[int, int, int]:
    """Check magic and version; return (version, number of tensors, number of key-value pairs)."""
    found = cursor.buffer[: len(MAGIC)]
    if found != MAGIC:
        if cursor.buffer[:8] == b"version ":
            raise cursor.error(
                "is a Git LFS pointer, not the model", "fetch it with `git lfs pull`"
            )
        raise cursor.error(
            f"is not a GGUF file: expected it to start with {MAGIC!r}, found {found!r}",
            "name a .gguf file, or make one with orthrus-convert",
        )
    cursor.skip(len(MAGIC), "magic")
    version = cursor.integer(_U32, "version")
    if version and version & 0xFFFF == 0:
        raise cursor.error("is big-endian GGUF, which is not supported", "use a little-endian file")
    if version == 1:
        raise cursor.error(
            "is GGUF version 1, which is no longer supported", "get a newer conversion of the model"
        )
    if version == 0:
        raise cursor.error("has GGUF version 0, expected 2 or 3")
    if version not in VERSIONS:
        raise cursor.error(
            f"has GGUF version {version}, expected 2 or 3",
            "update orthrus-gguf, or download the file again if that does not help",
        )
    n_tensors = cursor.integer(_U64, "number of tensors")
    n_metadata = cursor.integer(_U64, "number of metadata entries")
    left = cursor.size - cursor.position
    for count, least, what in (
        (n_metadata, _MIN_KEY_VALUE, "metadata entries"),
        (n_tensors, _MIN_TENSOR, "tensors"),
    ):
        if count > left // least:
            raise cursor.error(f"claims {count} {what}, more than fit into its {cursor.size} bytes")
        if count > MAX_ENTRIES:
            raise cursor.error(f"claims {count} {what}, expected at most {MAX_ENTRIES}")
    return version, n_tensors, n_metadata


def _read_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Value], dict[str, ValueTypes]]:
    metadata: dict[str, Value] = {}
    types: dict[str, ValueTypes] = {}
    for index in range(count):
        key = cursor.string(f"key of metadata entry {index}", MAX_KEY)
        if not key:
            raise cursor.error(f"metadata entry {index} has an empty key")
        what = f"metadata key {_shorten(key)}"
        if key in metadata:
            raise cursor.error(f"{what} occurs twice")
        kind = _value_type(cursor, what)
        if kind == _TYPES.ARRAY:
            item = _value_type(cursor, f"array at {what}")
            metadata[key] = _read_array(cursor, item, f"array at {what}")
            types[key] = (kind, item)
        else:
            metadata[key] = _read_value(cursor, kind, what)
            types[key] = (kind, None)
    return metadata, types


def _read_value(cursor: Cursor, kind: gguf.GGUFValueType, what: str) -> Value:
    """One metadata value of type `kind`, which is no array."""
    if kind == _TYPES.STRING:
        return cursor.string(what)
    value = cursor.number(_SCALARS[kind], what)
    if kind == _TYPES.BOOL:
        if value not in (0, 1):
            raise cursor.error(f"{what}: expected a bool stored as 0 or 1, found {value}")
        return bool(value)
    return value


def _read_array(cursor: Cursor, kind: gguf.GGUFValueType, what: str) -> list[str] | NDArray[Any]:
    """An array with items of type `kind`."""
    count = cursor.integer(_U64, f"length of the {what}")
    if kind == _TYPES.ARRAY:
        raise cursor.error(f"{what} holds arrays", "nested arrays are not supported")
    if kind == _TYPES.STRING:
        return cursor.strings(count, what)
    array = cursor.numbers(count, np.dtype(_SCALARS[kind].format), what)
    if kind == _TYPES.BOOL:
        if array.size and int(array.max()) > 1:
            raise cursor.error(f"{what}: expected bools stored as 0 or 1, found {array.max()}")
        return array.view(np.bool_)
    return array


def _value_type(cursor: Cursor, what: str) -> gguf.GGUFValueType:
    number = cursor.integer(_U32, f"type of {what}")
    try:
        return gguf.GGUFValueType(number)
    except ValueError:
        raise cursor.error(f"{what} has the unknown type {number}") from None


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    """The file's alignment in bytes, from the metadata."""
    value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int):
        kind = type(value).__name__
        raise cursor.error(f"metadata key {ALIGNMENT_KEY}: expected an integer, found a {kind}")
    if value < 1 or value & (value - 1):
        raise cursor.error(f"metadata key {ALIGNMENT_KEY}: expected a power of 2, found {value}")
    return value


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """All tensor entries, with offsets made absolute. They must lie one after the other."""
    entries = [_read_tensor(cursor, index) for index in range(count)]
    start = _align(cursor.position, alignment)
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for entry in entries:
        what = f"tensor {entry.name!r}"
        if entry.name in tensors:
            raise cursor.error(f"{what} occurs twice")
        if entry.offset % alignment:
            raise cursor.error(f"{what}: offset {entry.offset} is no multiple of {alignment}")
        if entry.offset != expected:
            fault = "overlaps the one before" if entry.offset < expected else "leaves a gap"
            raise cursor.error(f"{what} {fault}: expected offset {expected}, found {entry.offset}")
        offset = start + entry.offset
        if offset + entry.n_bytes > cursor.size:
            raise cursor.error(
                f"{what} ends at byte {offset + entry.n_bytes}, the file at {cursor.size}"
            )
        tensors[entry.name] = replace(entry, offset=offset)
        expected = _align(entry.offset + entry.n_bytes, alignment)
    return tensors


def _read_tensor(cursor: Cursor, index: int) -> TensorInfo:
    """One tensor entry, its offset still relative to the start of the data."""
    name = cursor.string(f"name of tensor {index}", MAX_TENSOR_NAME)
    if not name:
        raise cursor.error(f"tensor {index} has an empty name")
    what = f"tensor {name!r}"
    n_dims = cursor.integer(_U32, f"number of dimensions of {what}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(f"{what}: expected 1 to {MAX_DIMS} dimensions, found {n_dims}")
    shape = tuple(cursor.integer(_I64, f"dimensions of {what}") for _ in range(n_dims))[::-1]
    if min(shape) < 1:
        raise cursor.error(f"{what}: expected positive dimensions, found {shape}")
    n_elements = math.prod(shape)
    if n_elements > MAX_INT64:
        raise cursor.error(f"{what}: shape {shape} overflows a 64-bit count of elements")
    number = cursor.integer(_U32, f"type of {what}")
    try:
        kind = gguf.GGMLQuantizationType(number)
        qblock, qblock_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.error(*_unknown_type(what, number)) from None
    if shape[-1] % qblock:
        raise cursor.error(f"{what}: rows of {shape[-1]} are no multiple of {kind.name}'s {qblock}")
    n_bytes = n_elements // qblock * qblock_bytes
    if n_bytes > MAX_INT64:
        raise cursor.error(f"{what}: shape {shape} of {kind.name} overflows a 64-bit byte count")
    offset = cursor.integer(_U64, f"offset of {what}")
    return TensorInfo(name, shape, kind, offset, n_bytes)


def _unknown_type(what: str, number: int) -> tuple[str, str]:
    """A problem, and what to do about it."""
    if number in _REMOVED:
        name, other = _REMOVED[number]
        return (
            f"{what} has the type {name} ({number}), which ggml has given up",
            f"get the model as {other}",
        )
    if number >= _FOREIGN:
        return (
            f"{what} has the unknown type {number}, perhaps one of ik_llama.cpp's own",
            "get the model in a type of llama.cpp, such as Q4_K_M or IQ4_XS",
        )
    return (
        f"{what} has the unknown type {number}",
        "update the gguf package, or download the file again if that does not help",
    )


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _shorten(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
