"""Weights of a checkpoint → the bytes of a GGUF tensor, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_converters.safetensors_file import SourceTensor, read_chunks
from orthrus_gguf.errors import OrthrusError

_Type = gguf.GGMLQuantizationType

#: Elements converted at a time: 4 MiB as float32, whatever the size of the tensor.
CHUNK = 1 << 20

_SAME = {"F32": _Type.F32, "F16": _Type.F16, "BF16": _Type.BF16}

#: The exponent bits of each type: all set means infinity or NaN.
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}

#: The first magnitude that overflows (for Q8_0: whose scale, a 127th of it, overflows F16).
_OVERFLOW = {
    _Type.F16: 65520.0,
    _Type.BF16: float(np.uint32(0x7F7F8000).view(np.float32)),
    _Type.Q8_0: 65520.0 * 127,
}


def encode(source: SourceTensor, kind: gguf.GGMLQuantizationType) -> Iterator[NDArray[Any]]:
    """The data of `source` as type `kind`, whole rows at a time.

    Bits are copied where the types are equal. Raises OrthrusError naming the tensor if a value is
    not finite, or too large for `kind`.
    """
    for chunk in read_chunks(source, CHUNK):
        _check_finite(chunk, source)
        if _SAME[source.dtype] == kind:
            yield chunk
            continue
        values = to_float32(chunk, source.dtype)
        _check_range(values, source, kind)
        yield gguf.quants.quantize(values, kind)


def to_float32(chunk: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Exact float32 values of weights in the safetensors type `dtype` (BF16: given as bits)."""
    if dtype == "BF16":
        return (chunk.astype(np.uint32) << 16).view(np.float32)
    return chunk.astype(np.float32)


def _check_finite(chunk: NDArray[Any], source: SourceTensor) -> None:
    bits = chunk.view(np.uint32 if source.dtype == "F32" else np.uint16)
    exponent = bits.dtype.type(_EXPONENT[source.dtype])
    if np.any((bits & exponent) == exponent):
        raise OrthrusError(
            f"{source.path}: weight {source.name} holds NaN or infinity; the checkpoint is damaged"
        )


def _check_range(
    values: NDArray[np.float32], source: SourceTensor, kind: gguf.GGMLQuantizationType
) -> None:
    limit = _OVERFLOW.get(kind)
    largest = max(float(values.max()), -float(values.min()))
    if limit is not None and largest >= limit:
        advice = "use --type f32" if kind == _Type.BF16 else "use --type bf16"
        raise OrthrusError(
            f"{source.path}: weight {source.name}: {largest:g} is too large for {kind.name}; "
            f"{advice}"
        )
