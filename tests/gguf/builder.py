"""GGUF files built byte by byte, so that tests can make every mistake a file can hold.

Written from the specification alone; nothing here is shared with the reader or the gguf package.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Value types of the specification.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = (
    range(13)
)
F32, F16, Q8_0, I32 = 0, 1, 8, 26


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, *, length: int | None = None) -> bytes:
    """A string; `length` overrides the length that is written before it."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def entry(key: str | bytes, kind: int, payload: bytes) -> bytes:
    """A metadata entry."""
    return string(key) + u32(kind) + payload


def array(key: str, kind: int, count: int, payload: bytes) -> bytes:
    """A metadata entry that holds an array."""
    return entry(key, ARRAY, u32(kind) + u64(count) + payload)


def tensor(
    name: str | bytes,
    dims: Sequence[int],
    kind: int = F32,
    offset: int = 0,
    *,
    n_dims: int | None = None,
) -> bytes:
    """A tensor entry; `dims` in the file's order (columns first)."""
    return (
        string(name)
        + u32(len(dims) if n_dims is None else n_dims)
        + b"".join(struct.pack("<q", n) for n in dims)
        + u32(kind)
        + u64(offset)
    )


def build(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_entries: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; the counts default to the true ones."""
    head = (
        magic
        + u32(version)
        + u64(len(tensors) if n_tensors is None else n_tensors)
        + u64(len(entries) if n_entries is None else n_entries)
        + b"".join(entries)
        + b"".join(tensors)
    )
    return head + b"\0" * (-len(head) % alignment) + data
