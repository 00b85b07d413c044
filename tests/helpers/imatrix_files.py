"""Importance matrices in both formats, written byte by byte or by the gguf package."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Values = Mapping[str, NDArray[np.float32]]


def random_importance(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    """Name and shape of matrices → importance of their columns, over four orders of magnitude."""
    rng = np.random.default_rng(3)
    return {
        name: np.exp(2 * rng.standard_normal(shape[-1])).astype(np.float32)
        for name, shape in tensors.items()
    }


def write_dat(path: Path, values: Values, n_calls: int = 4, dataset: str | None = "x.txt") -> None:
    """The old format. A file without dataset ends after the entries, as the oldest ones do."""
    data = struct.pack("<i", len(values))
    for name, importance in values.items():
        sums = (importance * np.float32(n_calls)).astype("<f4")
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", n_calls, sums.size) + sums.tobytes()
    if dataset is not None:
        data += struct.pack("<ii", 7, len(dataset)) + dataset.encode()
    path.write_bytes(data)


def write_gguf(path: Path, values: Values, count: float = 4.0) -> None:
    """The current format."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, importance in values.items():
        sums = (importance * np.float32(count)).astype(np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
