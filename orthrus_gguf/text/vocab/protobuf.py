"""As much of protobuf as SentencePiece models need: fields of integers, floats and bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator


def integer(field: int, value: int) -> bytes:
    """An integer field (of at least 0)."""
    return _varint(field << 3) + _varint(value)


def single(field: int, value: float) -> bytes:
    """A float field."""
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def message(field: int, data: bytes) -> bytes:
    """A field of bytes: a string or a message."""
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message that is known to be sound: (number, integer or contents)."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _read_varint(data, position)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size, position = _read_varint(data, position)
        yield key >> 3, data[position : position + size]
        position += size


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A varint and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        shift += 7
        position += 1
        if byte < 0x80:
            return value, position
