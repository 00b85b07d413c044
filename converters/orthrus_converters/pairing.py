"""Do these heads belong to this base, as their weights tell?

Heads were trained against the exact weights of their base. Where the source of the heads also has
the AR weights, rows of every tensor are compared with those of the base: they must agree as well
as quantization allows, which is measured by quantizing the rows in question to the same type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_converters.source_tensor import SourceTensor, opened, read_rows, to_float32
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.ggml.quantize import needs_importance, quantize
from orthrus_gguf.model.tensors import OUTPUT, TOKEN_EMBD

SAMPLED_ROWS = 8  # of each matrix
ROUNDING = 1e-6  # relative square error that conversions between float types may leave (F16: 1e-7)

#: How many times the error of plain quantization is still explained by it. An imatrix trades the
#: error of some columns for that of others: with column weights spread over e^-4 … e^4, trained
#: weights showed at most 1.4 for types of 3 bits and more, and 2.1 below.
TOLERANCE = 2.5
#: A relative square error that nothing explains: matrices that have nothing in common have 2.
HOPELESS = 1.0


@dataclass(frozen=True)
class Agreement:
    """How the AR weights on both sides compare. worst: the largest error, as a multiple of the
    error of quantization, and `name` where it was found."""

    n_tensors: int
    worst: float
    name: str


def check_weights(
    base: Mapping[str, SourceTensor], reference: Mapping[str, SourceTensor], heads_name: str
) -> Agreement | None:
    """Compare what both sides have; None if that is nothing.

    reference: the AR weights that the heads were trained with, by their names in the file. Raises
    OrthrusError, naming the tensor, for a difference that quantization does not explain.
    """
    found: list[tuple[float, str]] = []
    for name, source in base.items():
        # A tied checkpoint has no output matrix of its own; a base may store a copy.
        twin = reference.get(name) or (reference.get(TOKEN_EMBD) if name == OUTPUT else None)
        if twin is None:
            continue
        error, explained = _compare(source, twin)
        multiple = error / explained
        if multiple > TOLERANCE or error > HOPELESS:
            raise OrthrusError(
                f"{heads_name}: these heads do not belong to {source.path}: its tensor {name} "
                f"({source.dtype}) differs from the one that they were trained with: relative "
                f"square error {error:.2g}, quantization explains {TOLERANCE * explained:.2g}; use "
                "the heads and the base of the same model"
            )
        found.append((multiple, name))
    if not found:
        return None
    worst, name = max(found)
    return Agreement(len(found), worst, name)


def _compare(base: SourceTensor, twin: SourceTensor) -> tuple[float, float]:
    """(relative square error between the two, error that their types explain), on sampled rows."""
    count = min(SAMPLED_ROWS, base.n_rows)
    rows = np.unique(np.linspace(0, base.n_rows - 1, count).astype(int))
    ours, theirs = _sample(base, rows), _sample(twin, rows)
    explained = ROUNDING + _quantization_error(theirs, base) + _quantization_error(ours, twin)
    return _error(ours, theirs), explained


def _sample(source: SourceTensor, rows: NDArray[np.int_]) -> NDArray[np.float32]:
    """Float32 values [rows, columns]."""
    with opened(source) as descriptor:
        parts = [read_rows(descriptor, source, int(row), 1) for row in rows]
    return np.concatenate([to_float32(part, source.dtype) for part in parts])


def _quantization_error(values: NDArray[np.float32], like: SourceTensor) -> float:
    """The error that storing `values` in the type of `like` makes."""
    kind = gguf.GGMLQuantizationType[like.dtype]
    if not like.is_quantized or not np.isfinite(values).all():
        return 0.0
    api = load_library().api
    importance = np.ones(like.columns, np.float32) if needs_importance(api, kind) else None
    stored = quantize(api, values, kind, importance)
    return _error(gguf.dequantize(stored, kind), values)


def _error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Sum of squared differences over the sum of squares; infinity where that says nothing."""
    difference = float(np.sum((found.astype(np.float64) - expected) ** 2))
    if difference == 0:
        return 0.0
    power = float(np.sum(expected.astype(np.float64) ** 2))
    ratio = difference / power if power else np.inf
    return ratio if np.isfinite(ratio) else np.inf
