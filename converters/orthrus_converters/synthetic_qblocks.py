"""Random weights as the bytes of a file: valid qblocks without a quantizer.

Any bits are valid in a qblock but those of its F16 scales. So qblocks are random bytes, and their
scales are set to give the weights the size that is asked for. One pool of qblocks serves a whole
file: tensors are cut from it at different places, which is as fast as copying memory.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

_Type = gguf.GGMLQuantizationType
Kind = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class _Scales:
    """Bytes in a qblock where its F16 scale lies and, where there is one, the F16 that shifts the
    weights; `shift` times the scale is the value of the latter that gives them a mean of zero."""

    scale: int
    shift_at: int | None = None
    shift: float = 0.0


#: From the structs in ggml's ggml-common.h. The mean of a code of b bits is (2^b - 1) / 2.
_SCALES = {
    _Type.Q4_0: _Scales(0),
    _Type.Q4_1: _Scales(0, 2, -7.5),
    _Type.Q5_0: _Scales(0),
    _Type.Q5_1: _Scales(0, 2, -15.5),
    _Type.Q8_0: _Scales(0),
    _Type.Q2_K: _Scales(80, 82, 1.5),
    _Type.Q3_K: _Scales(108),
    _Type.Q4_K: _Scales(0, 2, 7.5),
    _Type.Q5_K: _Scales(0, 2, 15.5),
    _Type.Q6_K: _Scales(208),
    **dict.fromkeys(
        (
            _Type.IQ1_S,
            _Type.IQ2_XXS,
            _Type.IQ2_XS,
            _Type.IQ2_S,
            _Type.IQ3_XXS,
            _Type.IQ3_S,
            _Type.IQ4_NL,
            _Type.IQ4_XS,
        ),
        _Scales(0),
    ),
}

_FLOATS = (_Type.F32, _Type.F16, _Type.BF16)

#: Every type that random_qblocks() can make. (The scale of IQ1_M is spread over its qblock.)
KINDS = frozenset({*_SCALES, *_FLOATS})

#: A pool holds at least so many qblocks, more than a matrix has rows, and so many bytes.
_MIN_QBLOCKS = 152_000
_MIN_BYTES = 1 << 24

#: How far scales differ, so that they are not all the same number.
_SPREAD = (0.75, 1.25)


def random_qblocks(
    rng: np.random.Generator, kind: Kind, count: int, rms: float
) -> NDArray[np.uint8]:
    """`count` valid qblocks [count, bytes per qblock] with weights of about this root mean square
    and zero mean. Raises KeyError for a type that is not in KINDS."""
    if kind in _FLOATS:
        values = rng.standard_normal(count, np.float32) * np.float32(rms)
        floats: NDArray[Any] = quants.quantize(values, kind)
        return floats.view(np.uint8).reshape(count, -1)
    scales = _SCALES[kind]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = bytearray(rng.bytes(count * size))  # which numpy may write to
    qblocks: NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(count, size)
    spread = rng.uniform(*_SPREAD, count).astype(np.float32)
    sample = qblocks[:2048]
    _set_scales(sample, scales, spread[: len(sample)])
    unit = float(np.sqrt(np.mean(quants.dequantize(sample, kind).astype(np.float64) ** 2)))
    _set_scales(qblocks, scales, spread * np.float32(rms / unit))
    return qblocks


def _set_scales(qblocks: NDArray[np.uint8], where: _Scales, scale: NDArray[np.float32]) -> None:
    _put(qblocks, where.scale, scale)
    if where.shift_at is not None:
        _put(qblocks, where.shift_at, scale * np.float32(where.shift))


def _put(qblocks: NDArray[np.uint8], at: int, values: NDArray[np.float32]) -> None:
    """Write one F16 into every qblock, at byte `at`."""
    qblocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


class RandomWeights:
    """The tensors of one file; the same ones for the same seed, in whatever order they are read."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._pools: dict[tuple[Kind, int], NDArray[np.uint8]] = {}

    def matrix(self, name: str, kind: Kind, shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
        """The bytes of a matrix whose rows are about unit length, so that products keep the size
        of what they multiply. No two rows are equal."""
        rows, columns = shape
        pool = self._pool(kind, columns)
        left = rows * columns // gguf.GGML_QUANT_SIZES[kind][0]
        at = int(self._rng(name).integers(len(pool)))
        while left:
            chunk = pool[at : at + left]
            yield chunk
            left -= len(chunk)
            at = 0

    def vector(self, name: str, size: int, *, mean: float) -> Iterator[NDArray[np.float32]]:
        """The weights of a norm (about one) or a bias (about zero)."""
        noise = self._rng(name).standard_normal(size, np.float32)
        yield np.float32(mean) + np.float32(0.1) * noise

    def _pool(self, kind: Kind, columns: int) -> NDArray[np.uint8]:
        """As many qblocks as some prime number: rows that begin a fixed number of qblocks apart
        then come back to the same place only after that many rows."""
        key = (kind, columns)
        if key not in self._pools:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            count = _prime_from(max(_MIN_QBLOCKS, _MIN_BYTES // size))
            rng = np.random.default_rng([self._seed, int(kind), columns])
            self._pools[key] = random_qblocks(rng, kind, count, columns**-0.5)
        return self._pools[key]

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(name.encode())])


@functools.cache
def _prime_from(number: int) -> int:
    """The smallest prime that is at least `number` (of at least 3)."""
    candidate = number | 1
    while any(candidate % divisor == 0 for divisor in range(3, int(candidate**0.5) + 1, 2)):
        candidate += 2
    return candidate
