"""Read safetensors files: a header that is checked in full, tensor data in pieces.

Why not the `safetensors` package: its numpy side knows no bfloat16. Why not
`gguf.utility.SafetensorsLocal`: it checks neither offsets nor sizes. Why reads and not a memory
map: mapped pages count as this process' memory, and a file that shrinks under a map kills the
process where a short read is an error that can be reported.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from orthrus_converters.json_file import describe, parse_object
from orthrus_gguf.errors import OrthrusError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library

#: Numpy types of the weights that we convert. bfloat16 is kept as its bits.
FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

_DOWNLOAD = "download it again"


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor lies in its file.

    dtype: as the file calls it (`BF16`, `F16`, `F32`, or one that we cannot convert).
    offset: of the first byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


def read_header(path: Path) -> dict[str, SourceTensor]:
    """All tensors of a file by name.

    Raises OrthrusError unless the header is sound and the data complete: every tensor inside the
    file, of the size that dtype and shape call for, one after the other without gaps.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size >= 8 and length > min(size - 8, MAX_HEADER):
                raise _header_error(path, size, length)
            header = file.read(length)
    except OSError as error:
        raise OrthrusError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size < 8:
        raise OrthrusError(f"{path}: is no safetensors file ({size} bytes); {_DOWNLOAD}")
    entries = parse_object(header, path)
    entries.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def read_chunks(tensor: SourceTensor, chunk_elements: int) -> Iterator[NDArray[Any]]:
    """The data of a tensor in whole rows, about `chunk_elements` at a time.

    Yields arrays of shape [rows, columns] in the type of FLOAT_DTYPES, so bfloat16 as bits. A 1-D
    tensor is one row. All chunks share one buffer: each is valid until the next is asked for.
    Raises OrthrusError if the file cannot be read to the end of the tensor.
    """
    dtype = FLOAT_DTYPES[tensor.dtype]
    columns = tensor.shape[-1]
    rows = tensor.n_bytes // (columns * dtype.itemsize)
    step = max(1, chunk_elements // columns)
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            buffer = np.empty((min(step, rows), columns), dtype)
            for start in range(0, rows, step):
                chunk = buffer[: rows - start]
                _read_into(file, chunk, tensor)
                yield chunk
    except OSError as error:
        raise OrthrusError(f"{tensor.path}: cannot be read: {error.strerror or error}") from error


def _read_into(file: Any, chunk: NDArray[Any], tensor: SourceTensor) -> None:
    """Fill `chunk`; one read() may return less than was asked for."""
    view = chunk.reshape(-1).view(np.uint8).data
    while view:
        count = file.readinto(view)
        if not count:
            raise OrthrusError(
                f"{tensor.path}: ends within tensor {tensor.name}; has it changed meanwhile?"
            )
        view = view[count:]


def _header_error(path: Path, size: int, length: int) -> OrthrusError:
    with path.open("rb") as file:
        start = file.read(8)
    if start == b"version ":
        return OrthrusError(
            f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
        )
    return OrthrusError(
        f"{path}: truncated, or no safetensors file: its header would have {length:,} bytes, "
        f"the file has {size:,}; {_DOWNLOAD}"
    )


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> SourceTensor:
    """One header entry, its offsets made absolute."""
    if not isinstance(entry, dict):
        raise _entry_error(path, name, entry)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets):
        raise _entry_error(path, name, entry)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _entry_error(path, name, entry)
    n_bytes = offsets[1] - offsets[0]
    if dtype in FLOAT_DTYPES:
        expected = math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
        if n_bytes != expected:
            raise OrthrusError(
                f"{path}: tensor {name}: expected {expected:,} bytes for {dtype} of shape "
                f"{tuple(shape)}, found {n_bytes:,}; {_DOWNLOAD}"
            )
    return SourceTensor(name, dtype, tuple(shape), path, data_start + offsets[0], n_bytes)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _entry_error(path: Path, name: str, entry: Any) -> OrthrusError:
    return OrthrusError(
        f"{path}: tensor {name}: expected dtype, shape and data_offsets, found {describe(entry)} "
        f"that does not hold them; {_DOWNLOAD}"
    )


def _check_layout(path: Path, tensors: list[SourceTensor], start: int, size: int) -> None:
    """Raise OrthrusError unless the tensors fill the file, without gaps or overlaps."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise OrthrusError(
                f"{path}: tensor {tensor.name}: expected at byte {end}, found at {tensor.offset}; "
                f"the header is damaged: {_DOWNLOAD}"
            )
        end += tensor.n_bytes
    if end != size:
        fault = "truncated" if end > size else "longer than its header says"
        raise OrthrusError(f"{path}: {fault}: expected {end:,} bytes, found {size:,}; {_DOWNLOAD}")
