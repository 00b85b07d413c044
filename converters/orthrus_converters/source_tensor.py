"""Tensors where they lie, in a safetensors or a GGUF file, and how their rows are read.

Why reads and not a memory map: mapped pages count as this process' memory, and a file that shrinks
under a map kills the process where a short read is an error that can be reported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError

#: Numpy types of unquantized weights. bfloat16 is kept as its bits.
FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class Change(Enum):
    """What becomes of every value of a tensor."""

    PLUS_ONE = "x + 1"
    MINUS_EXP = "-exp(x)"

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """In single precision."""
        return values + np.float32(1) if self is Change.PLUS_ONE else -np.exp(values)


@dataclass(frozen=True)
class HeadOrder:
    """Value heads as ggml wants them: those that share a key head lie apart, not together.

    Of n_groups · per_group heads of `size` elements behind `start` others, head g · per_group + j
    becomes head j · n_groups + g.
    """

    n_groups: int
    per_group: int
    size: int
    start: int = 0

    def sources(self) -> NDArray[np.intp]:
        """Where each element comes from."""
        heads = np.arange(self.n_groups * self.per_group).reshape(self.n_groups, self.per_group)
        elements = heads.T.reshape(-1, 1) * self.size + np.arange(self.size)
        return np.concatenate([np.arange(self.start), self.start + elements.ravel()])


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor lies in its file.

    dtype: as the file calls it (`BF16`, `F16`, `F32`, a ggml type, or one that we cannot convert).
    shape: numpy order, rows first. A 1-D tensor is one row.
    offset: of the first byte, from the start of the file.
    paired_heads: where it is not 0, reading interleaves the halves of so many heads: rows (elements
        of a vector) i and i + head_dim / 2 of a head become 2i and 2i + 1, so that RoPE on adjacent
        pairs turns the same ones together.
    values: of a tensor that is computed from what the file `path` says, in F32, rather than read.
    row_order, column_order: the order to read them in; None as they lie.
    change: what is done to every value, in F32, which is then the type of the tensor. stored: the
        type in the file, where that is another.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int
    paired_heads: int = 0
    values: tuple[float, ...] | None = None
    row_order: HeadOrder | None = None
    column_order: HeadOrder | None = None
    change: Change | None = None
    stored: str = ""

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row. Rows hold whole qblocks."""
        return self.n_bytes * self.columns // self.n_elements

    @property
    def n_rows(self) -> int:
        return self.n_elements // self.columns

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        return self.dtype not in FLOAT_DTYPES


@contextmanager
def opened(tensor: SourceTensor) -> Iterator[int]:
    """A descriptor of the tensor's file, for read_rows(). Raises OrthrusError."""
    try:
        with tensor.path.open("rb", buffering=0) as file:
            yield file.fileno()
    except OSError as error:
        raise OrthrusError(f"{tensor.path}: cannot be read: {error.strerror or error}") from error


def read_rows(descriptor: int, tensor: SourceTensor, first: int, count: int) -> NDArray[Any]:
    """Rows `first` … `first + count - 1`, read-only: [count, columns] in the type of FLOAT_DTYPES
    (so bfloat16 as bits), or bytes [count, row_bytes] of a quantized tensor.

    Does not move the file's position: threads may share the descriptor. Raises OrthrusError if the
    file ends before that.
    """
    if tensor.values is not None:
        values: NDArray[Any] = np.array(tensor.values, np.float32).reshape(-1, tensor.columns)
        return values[first:][:count]
    if not tensor.paired_heads:
        rows = _read_in_order(descriptor, tensor, first, count)
        if tensor.column_order is not None:
            rows = np.ascontiguousarray(rows[:, tensor.column_order.sources()])
        if tensor.change is not None:
            rows = tensor.change(to_float32(rows, tensor.stored))
        return rows
    if len(tensor.shape) == 1:
        elements = _read_as_they_lie(descriptor, tensor, 0, 1).reshape(-1, 1)
        return _paired(elements, tensor.paired_heads).reshape(1, -1)
    head_dim = tensor.n_rows // tensor.paired_heads
    start = first - first % head_dim  # whole heads, since their rows are taken from all over them
    n_heads = -(-(first + count - start) // head_dim)
    paired = _paired(_read_as_they_lie(descriptor, tensor, start, n_heads * head_dim), n_heads)
    wanted: NDArray[Any] = paired[first - start :][:count]
    return wanted


def _read_in_order(descriptor: int, tensor: SourceTensor, first: int, count: int) -> NDArray[Any]:
    """Rows as `row_order` has them: a read for each run of them that lies together."""
    if tensor.row_order is None:
        return _read_as_they_lie(descriptor, tensor, first, count)
    sources = tensor.row_order.sources()[first:][:count]
    runs = np.split(sources, np.flatnonzero(np.diff(sources) != 1) + 1)
    parts = [_read_as_they_lie(descriptor, tensor, int(run[0]), len(run)) for run in runs]
    return np.concatenate(parts)


def _paired(rows: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Rows of `n_heads` heads, the halves of each interleaved."""
    halves = rows.reshape(n_heads, 2, -1, rows.shape[1])
    paired: NDArray[Any] = halves.swapaxes(1, 2).reshape(rows.shape)
    return paired


def _read_as_they_lie(
    descriptor: int, tensor: SourceTensor, first: int, count: int
) -> NDArray[Any]:
    offset, left = tensor.offset + first * tensor.row_bytes, count * tensor.row_bytes
    parts: list[bytes] = []
    while left:
        try:
            part = os.pread(descriptor, left, offset)
        except OSError as error:
            reason = error.strerror or error
            raise OrthrusError(f"{tensor.path}: cannot be read: {reason}") from error
        if not part:
            raise OrthrusError(
                f"{tensor.path}: ends within tensor {tensor.name}; has it changed meanwhile?"
            )
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    dtype = FLOAT_DTYPES.get(tensor.stored or tensor.dtype, np.dtype(np.uint8))
    return np.frombuffer(data, dtype).reshape(count, -1)


def read_chunks(tensor: SourceTensor, chunk_elements: int) -> Iterator[NDArray[Any]]:
    """All rows in order, about `chunk_elements` at a time, as read_rows() gives them."""
    with opened(tensor) as descriptor:
        for first, count in row_ranges(tensor, chunk_elements):
            yield read_rows(descriptor, tensor, first, count)


def row_ranges(tensor: SourceTensor, chunk_elements: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of chunks of about `chunk_elements`, at least one row each."""
    step = max(1, chunk_elements // tensor.columns)
    for first in range(0, tensor.n_rows, step):
        yield first, min(step, tensor.n_rows - first)


def to_float32(rows: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Float32 values [rows, columns] of what read_rows() gives for a tensor of type `dtype`."""
    if dtype == "BF16":
        bits = rows.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if dtype in FLOAT_DTYPES:
        return rows.astype(np.float32)
    try:
        values: NDArray[np.float32] = gguf.dequantize(rows, gguf.GGMLQuantizationType[dtype])
    except NotImplementedError:
        raise OrthrusError(
            f"tensors of type {dtype} cannot be converted; use a file of another type"
        ) from None
    return values
