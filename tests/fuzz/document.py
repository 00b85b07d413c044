"""GGUF files taken apart and put together again: the parts that mutations change.

Written from the specification; nothing here is shared with the reader under test.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

from tests.gguf.builder import ARRAY, STRING, tensor

#: Bytes of one value, by value type; strings and arrays have none.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MAGIC = struct.Struct("<4sIQQ")
MAX_STEPS = 1 << 20  # the walk may meet lengths that an earlier mutation has changed

#: Type numbers of tensors: elements and bytes of a qblock.
QBLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210)}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor entry; `dims` in the file's order, `offset` from the start of the data."""

    name: bytes
    dims: tuple[int, ...]
    type: int
    offset: int

    def encode(self) -> bytes:
        return tensor(self.name, self.dims, self.type, self.offset)

    @property
    def size(self) -> int:
        """Bytes of data, roughly where the type is unknown."""
        qblock, size = QBLOCKS.get(self.type, (32, 32))
        count = 1
        for dim in self.dims:
            count *= dim
        return max(count, 0) // qblock * size


@dataclass
class Document:
    """The parts of a file, and where its numbers lie (offset, bytes)."""

    version: int
    entries: list[bytes]
    tensors: list[TensorEntry]
    data: bytes
    numbers: list[tuple[int, int]] = field(default_factory=list)

    def encode(self) -> bytes:
        head = MAGIC.pack(b"GGUF", self.version, len(self.tensors), len(self.entries))
        head += b"".join(self.entries) + b"".join(t.encode() for t in self.tensors)
        return head + bytes(-len(head) % 32) + self.data

    def pack_tensors(self) -> None:
        """Give tensors the offsets that their sizes ask for, and some data."""
        offset, packed = 0, []
        for one in self.tensors:
            packed.append(replace(one, offset=offset % (1 << 64)))
            offset += -(-one.size // 32) * 32
        self.tensors = packed
        if len(self.data) < offset <= 1 << 17:
            self.data += bytes(offset - len(self.data))


class _Walk:
    """Steps through a header and notes every number. Raises struct.error past the end."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at, self.steps = content, 0, 0
        self.numbers: list[tuple[int, int]] = []

    def number(self, width: int) -> int:
        self.steps += 1
        if self.at + width > len(self.content) or self.steps > MAX_STEPS:
            raise struct.error("past the end")
        self.numbers.append((self.at, width))
        self.at += width
        return int.from_bytes(self.content[self.at - width : self.at], "little")

    def text(self) -> bytes:
        length = self.number(8)
        self.at += length
        return self.content[self.at - length : self.at]

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            element, count = self.number(4), self.number(8)
            if element == STRING:
                for _ in range(count):
                    self.text()
            else:
                width = WIDTHS.get(element, 1)
                places = {0, count // 2, count - 1} if count else ()  # all would drown the others
                self.numbers += [(self.at + place * width, width) for place in places]
                self.at += count * width
        else:
            self.number(WIDTHS.get(kind, 4))


def parse(content: bytes) -> Document | None:
    """The parts of a file whose header can be followed to its end, else None."""
    walk = _Walk(content)
    try:
        walk.at = 4
        version, n_tensors, n_entries = walk.number(4), walk.number(8), walk.number(8)
        entries = []
        for _ in range(n_entries):
            start = walk.at
            walk.text()
            walk.value(walk.number(4))
            entries.append(content[start : walk.at])
        tensors = []
        for _ in range(n_tensors):
            name = walk.text()
            dims = tuple(walk.number(8) for _ in range(min(walk.number(4), 8)))
            dims = tuple(dim - (dim >> 63 << 64) for dim in dims)
            tensors.append(TensorEntry(name, dims, walk.number(4), walk.number(8)))
    except struct.error:
        return None
    if walk.at > len(content):
        return None
    data = content[walk.at + -walk.at % 32 :]
    return Document(version, entries, tensors, data, walk.numbers)


def split_entry(encoded: bytes) -> tuple[bytes, bytes]:
    """Key and value of an encoded entry."""
    end = 8 + int.from_bytes(encoded[:8], "little")
    return encoded[:end], encoded[end:]


def strings_at(encoded: bytes) -> list[tuple[int, int]]:
    """(offset, length) of each string in the value of an entry."""
    walk = _Walk(encoded)
    walk.text()
    kind = walk.number(4)
    count = 1
    if kind == ARRAY:
        kind, count = walk.number(4), walk.number(8)
    if kind != STRING:
        return []
    return [(walk.at, len(walk.text())) for _ in range(count)]
