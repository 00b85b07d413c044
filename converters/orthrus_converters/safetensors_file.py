"""Read the headers of safetensors files, and check them in full.

Why not the `safetensors` package: its numpy side knows no bfloat16. Why not
`gguf.utility.SafetensorsLocal`: it checks neither offsets nor sizes.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeGuard

from orthrus_converters.json_file import describe, parse_object
from orthrus_converters.source_tensor import FLOAT_DTYPES, SourceTensor
from orthrus_gguf.errors import OrthrusError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library

_DOWNLOAD = "download it again"


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
    """Raise OrthrusError unless the tensors fill the file, without gaps or overlaps.

    In whatever order the header names them; empty ones lie between others."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if tensor.offset != end:
            raise OrthrusError(
                f"{path}: tensor {tensor.name}: expected at byte {end}, found at {tensor.offset}; "
                f"the header is damaged: {_DOWNLOAD}"
            )
        end += tensor.n_bytes
    if end != size:
        fault = "truncated" if end > size else "longer than its header says"
        raise OrthrusError(f"{path}: {fault}: expected {end:,} bytes, found {size:,}; {_DOWNLOAD}")
