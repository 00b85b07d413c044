"""Quantize with ggml: bytes equal to llama.cpp's for every type."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.binding import Ggml

_TYPES = gguf.GGMLQuantizationType


def needs_importance(api: Ggml, qtype: gguf.GGMLQuantizationType) -> bool:
    """True for types that ggml quantizes only with importance weights (an imatrix)."""
    return bool(api.quantize_requires_imatrix(int(qtype)))


def quantize(
    api: Ggml,
    values: NDArray[np.float32],
    qtype: gguf.GGMLQuantizationType,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Quantize the rows of `values` [rows, columns] to bytes [rows, bytes per row].

    importance: weight of each column's squared error [columns], larger means more exact.
    Raises OrthrusError for what ggml would answer by aborting the process: a row length that is
    no multiple of the type's qblock, values that are not finite, a missing imatrix.
    """
    rows, columns = values.shape
    qblock = int(api.blck_size(int(qtype)))
    if rows == 0 or columns == 0 or columns % qblock:
        raise OrthrusError(
            f"cannot quantize {rows} rows of {columns} values to {qtype.name}: "
            f"its rows are made of qblocks of {qblock}; choose a type that fits"
        )
    if not np.isfinite(values).all():
        raise OrthrusError(f"cannot quantize to {qtype.name}: some values are infinite or NaN")
    if qtype is _TYPES.F32:
        return np.ascontiguousarray(values, np.float32).view(np.uint8)
    if importance is None and needs_importance(api, qtype):
        raise OrthrusError(f"{qtype.name} needs an importance matrix (imatrix); pass one")
    if importance is not None and importance.shape != (columns,):
        raise OrthrusError(
            f"importance matrix: expected {columns} values, found shape {importance.shape}"
        )
    source = np.ascontiguousarray(values, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    result = np.empty((rows, int(api.row_size(int(qtype), columns))), np.uint8)
    written = api.quantize_chunk(
        int(qtype),
        source.ctypes.data,
        result.ctypes.data,
        0,
        rows,
        columns,
        None if weights is None else weights.ctypes.data,
    )
    if written != result.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes, expected {result.nbytes}")
    return result
