"""Importance matrices: which columns of a weight matter, measured by llama-imatrix.

Two formats: GGUF with `<name>.in_sum2` and `<name>.counts`, and the older `.dat`. Importance is
the mean square of what a column was multiplied with. Source: load_imatrix and load_legacy_imatrix
in llama.cpp's tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import MAGIC, GGUFFile
from orthrus_gguf.model.tensors import TOKEN_EMBD, is_diffusion_tensor

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_BYTES = 1 << 32  # of a .dat; those of the largest models have some hundred megabytes
_INT = struct.Struct("<i")
_ADVICE = "make the imatrix again, or get another file"

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Imatrix:
    """values: tensor name → importance of each column, finite and not negative.

    datasets, n_chunks: of the text that it was measured on; empty and 0 where the file has neither.
    """

    path: Path
    values: Mapping[str, Values]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0

    def find(self, name: str, columns: int) -> Values | None:
        """The importance of each column of tensor `name`; None if the file has nothing for it.

        A diffusion twin without an entry of its own has that of its AR tensor: llama-imatrix runs
        the AR view only, and both views multiply with much the same activations. Raises
        OrthrusError if the number of columns differs.
        """
        values = self.values.get(name)
        if values is None and is_diffusion_tensor(name):
            values = self.values.get(name.replace("_diff.weight", ".weight"))
        if values is None or (values.size != columns and name == TOKEN_EMBD):
            return None  # what llama-imatrix has for an embedding is not per column
        if values.size != columns:
            raise OrthrusError(
                f"{self.path}: has {values.size} values for {name}, expected {columns}; "
                "it was made for another model"
            )
        return values


def read_imatrix(path: Path) -> Imatrix:
    """Read either format. Raises OrthrusError."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            if start != MAGIC:
                return _checked(_read_dat(path, start + file.read(_MAX_BYTES)))
    except OSError as error:
        raise OrthrusError(f"{path}: cannot be read: {error.strerror or error}") from error
    return _checked(_read_gguf(path))


def _read_gguf(path: Path) -> Imatrix:
    with GGUFFile.open(path) as file:
        kind = file.metadata.get(gguf.Keys.General.TYPE)
        if kind != "imatrix":
            raise OrthrusError(
                f"{path}: expected an imatrix (general.type), found {kind!r}; name the file that "
                "llama-imatrix made"
            )
        names = [name[: -len(_SUMS)] for name in file.tensors if name.endswith(_SUMS)]
        values = {name: _mean(file, name) for name in names}
        datasets = file.metadata.get("imatrix.datasets", [])
        n_chunks = file.metadata.get("imatrix.chunk_count", 0)
    return Imatrix(
        path,
        values,
        tuple(datasets) if isinstance(datasets, list) else (),
        n_chunks if isinstance(n_chunks, int) else 0,
    )


def _mean(file: GGUFFile, name: str) -> Values:
    """Sums over counts; 1 where nothing was counted."""
    arrays = []
    for suffix in (_SUMS, _COUNTS):
        info = file.tensors.get(name + suffix)
        if info is None or info.type != gguf.GGMLQuantizationType.F32:
            raise OrthrusError(f"{file.path}: expected {name}{suffix} in F32; {_ADVICE}")
        arrays.append(file.data(name + suffix).view("<f4"))
    sums, counts = arrays
    if sums.size % counts.size:
        raise OrthrusError(
            f"{file.path}: {name} has {sums.size} sums for {counts.size} counts; {_ADVICE}"
        )
    per_count = sums.reshape(counts.size, -1)
    counted = counts[:, None] > 0
    mean = np.ones(per_count.shape, np.float32)
    np.divide(per_count, counts[:, None], where=counted, out=mean)
    return mean.reshape(-1)


def _read_dat(path: Path, data: bytes) -> Imatrix:
    """Entries of (name length, name, calls, number of values, values); all integers are 32 bits."""
    position = 0

    def take(n_bytes: int, what: str) -> bytes:
        nonlocal position
        if not 0 <= n_bytes <= len(data) - position:
            raise OrthrusError(f"{path}: is no imatrix, or damaged ({what}); {_ADVICE}")
        position += n_bytes
        return data[position - n_bytes : position]

    def integer(what: str) -> int:
        return int(_INT.unpack(take(_INT.size, what))[0])

    values: dict[str, Values] = {}
    for index in range(integer("number of entries")):
        what = f"entry {index}"
        name = take(integer(what), what).decode("utf-8", "replace")
        n_calls, n_values = integer(what), integer(what)
        if n_values < 1:
            raise OrthrusError(f"{path}: {what} has {n_values} values; {_ADVICE}")
        sums = np.frombuffer(take(4 * n_values, what), "<f4")
        values[name] = sums / np.float32(n_calls) if n_calls > 0 else sums.copy()
    if len(data) - position < 8:  # older files end here
        return Imatrix(path, values)
    n_chunks = integer("number of chunks")
    dataset = take(integer("dataset"), "dataset").decode("utf-8", "replace")
    return Imatrix(path, values, (dataset,), max(n_chunks, 0))


def _checked(imatrix: Imatrix) -> Imatrix:
    if not imatrix.values:
        raise OrthrusError(f"{imatrix.path}: is no imatrix, or empty; {_ADVICE}")
    for name, values in imatrix.values.items():
        if not np.isfinite(values).all() or values.min() < 0:
            raise OrthrusError(
                f"{imatrix.path}: the importance for {name} is negative or not finite; {_ADVICE}"
            )
    return imatrix
