"""A bounds-checked read position in a mapped file: the only code that trusts no byte of it."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError

#: What to do about a file that breaks the rules of the format.
DAMAGED = "the file is damaged or incomplete: download or convert it again"

#: Far above anything real; keeps a lying length from claiming the tensor data as metadata.
MAX_STRING = 1 << 26
MAX_ELEMENTS = 1 << 24

#: Bytes of the file that are copied at a time to read arrays of strings from.
PART = 1 << 18

_LENGTH = struct.Struct("<Q")


def map_file(path: Path) -> mmap.mmap:
    """Map the file `path` read-only. Raises OrthrusError if it cannot be read or is empty."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "special file"
            raise OrthrusError(f"{path}: expected a GGUF file, found a {kind}; name the .gguf file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise OrthrusError(f"{path}: the file is empty; download or convert it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise OrthrusError(f"{path}: no such file; check the path") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise OrthrusError(f"{path}: cannot be read: {reason}; check the path") from error


class Cursor:
    """Reads little-endian values of `path` one after the other.

    Every length is compared with what is left of the file before it is used, so that no read can
    allocate more than a small multiple of the file's own bytes. All errors are OrthrusError.
    """

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.size = len(buffer)
        self.position = 0

    def error(self, problem: str, advice: str = DAMAGED) -> OrthrusError:
        """The error to raise for `problem`, with the file in front and what to do behind."""
        return OrthrusError(f"{self.path}: {problem}; {advice}")

    def skip(self, n_bytes: int, what: str) -> int:
        """Move past `n_bytes` and return where they start."""
        start = self.position
        if n_bytes > self.size - start:
            raise self.error(
                f"{what} needs {n_bytes} bytes at offset {start}, the file ends at {self.size}"
            )
        self.position = start + n_bytes
        return start

    def number(self, kind: struct.Struct, what: str) -> int | float:
        """One number of a fixed-size struct format."""
        value: int | float = kind.unpack_from(self.buffer, self.skip(kind.size, what))[0]
        return value

    def integer(self, kind: struct.Struct, what: str) -> int:
        """One number of an integer struct format."""
        return int(self.number(kind, what))

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        """A string: its length as u64, then that many bytes of UTF-8."""
        n_bytes = self.integer(_LENGTH, f"length of {what}")
        if n_bytes > limit:
            raise self.error(f"{what} is {n_bytes} bytes long, expected at most {limit}")
        start = self.skip(n_bytes, what)
        try:
            return str(self.buffer[start : start + n_bytes], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not valid UTF-8") from None

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings."""
        self._check_count(count, _LENGTH.size, what)
        out: list[str] = []
        while len(out) < count:
            self._quick_strings(out, count)
            if len(out) < count:
                out.append(self._string_of(len(out), count, what))
        return out

    def _quick_strings(self, out: list[str], count: int) -> None:
        """Add to `out`, until it holds `count`, the next strings that are whole and in the next
        PART of the file. The loop is spelled out, and works on a copy, which is faster to take
        apart than the mapping: a vocabulary and its merges are 300,000 strings.
        """
        part = self.buffer[self.position : self.position + PART]
        end, unpack, position = len(part), _LENGTH.unpack_from, 0
        try:
            for _ in range(count - len(out)):
                start = position + 8
                if start > end:
                    break
                stop = start + unpack(part, position)[0]
                if stop > end:
                    break
                out.append(str(part[start:stop], "utf-8"))
                position = stop
        except UnicodeDecodeError:
            pass  # the caller's next look at this string finds it too, and says where
        self.position += position

    def _string_of(self, index: int, count: int, what: str) -> str:
        """String `index` of `count`, wherever it ends."""
        if self.position + _LENGTH.size > self.size:
            raise self.error(f"{what} ends in the middle of string {index} of {count}")
        start = self.skip(_LENGTH.size, what) + _LENGTH.size
        stop = start + _LENGTH.unpack_from(self.buffer, start - _LENGTH.size)[0]
        if stop > self.size:
            raise self.error(f"string {index} of {what} ends at {stop}, the file at {self.size}")
        self.position = stop
        try:
            return str(self.buffer[start:stop], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"string {index} of {what} is not valid UTF-8") from None

    def numbers(self, count: int, dtype: np.dtype[np.generic], what: str) -> NDArray[np.generic]:
        """`count` numbers as a read-only array of their own (aligned, unlike the file's bytes)."""
        self._check_count(count, dtype.itemsize, what)
        start = self.skip(count * dtype.itemsize, what)
        array: NDArray[np.generic] = np.frombuffer(self.buffer, dtype, count, start).copy()
        array.flags.writeable = False
        return array

    def _check_count(self, count: int, n_bytes: int, what: str) -> None:
        left = self.size - self.position
        if count > left // n_bytes:
            raise self.error(
                f"{what} has {count} elements of at least {n_bytes} bytes, "
                f"the rest of the file has {left} bytes"
            )
        if count > MAX_ELEMENTS:
            raise self.error(f"{what} has {count} elements, expected at most {MAX_ELEMENTS}")
