"""Weights → the bytes of a GGUF tensor: a few rows at a time, on all cores, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_converters.source_tensor import (
    SourceTensor,
    opened,
    read_rows,
    row_ranges,
    to_float32,
)
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.ggml.quantize import quantize

_Type = gguf.GGMLQuantizationType
Importance = NDArray[np.float32]

#: Elements of one job: 2 MiB as float32, whatever the size of the tensor. Small enough for caches
#: and for threads to finish a tensor at about the same time; larger ones are no faster.
CHUNK = 1 << 19

_KEPT = 1 << 24  # bytes: more than the arrays of one job

#: All bits but the sign, and the smallest such pattern that means infinity or NaN.
_MAGNITUDE = {
    "F32": (0x7FFFFFFF, 0x7F800000),
    "F16": (0x7FFF, 0x7C00),
    "BF16": (0x7FFF, 0x7F80),
}

_HALF_OVERFLOW = 65520.0  # the first magnitude that rounds to infinity in F16

#: The first magnitude that overflows. The scales of qblocks are F16: an 127th of the largest value
#: for Q8_0, and for the others at most the value itself.
_OVERFLOW = {
    _Type.F32: np.inf,
    _Type.BF16: float(np.uint32(0x7F7F8000).view(np.float32)),
    _Type.Q8_0: _HALF_OVERFLOW * 127,
}


def default_threads() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """What becomes of one tensor, `name` in the new file.

    importance: weight of each column's squared error [columns], from an imatrix.
    verbatim: the bytes are copied without a look at them (the types must be equal).
    """

    name: str
    source: SourceTensor
    kind: gguf.GGMLQuantizationType
    importance: Importance | None = None
    verbatim: bool = False

    @property
    def n_bytes(self) -> int:
        """Size of the new data, without padding."""
        qblock, qblock_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return self.source.n_elements // qblock * qblock_bytes


class Encoder:
    """Threads that read, check and quantize. Use as a context manager, or close it."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        _keep_memory()
        self._pool = ThreadPoolExecutor(threads, "encoder")

    def encode(self, job: Job) -> Iterator[NDArray[Any]]:
        """The data of the tensor in its new type, whole rows at a time.

        Bits are copied where the types are equal. Raises OrthrusError naming the tensor if a value
        is not finite, or too large for the type.
        """
        api = load_library().api if job.source.dtype != job.kind.name else None
        pending: deque[Future[NDArray[Any]]] = deque()
        with opened(job.source) as descriptor:
            try:
                for first, count in row_ranges(job.source, CHUNK):
                    pending.append(
                        self._pool.submit(_encode_rows, job, api, descriptor, first, count)
                    )
                    if len(pending) > 2 * self._threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:  # the descriptor must not be closed, and reused, under a running job
                for future in pending:
                    future.cancel()
                for future in pending:
                    if not future.cancelled():
                        future.exception()

    def close(self) -> None:
        """Wait for running jobs, drop the others."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _keep_memory() -> None:
    """Have malloc keep the memory of freed chunks instead of giving it back to the system.

    Page faults would otherwise cost more time than copying does. glibc raises its thresholds to
    the largest block freed so far (M_MMAP_THRESHOLD in mallopt(3)); elsewhere this does nothing.
    """
    block = np.empty(_KEPT, np.uint8)
    del block


def _encode_rows(
    job: Job, api: Ggml | None, descriptor: int, first: int, count: int
) -> NDArray[Any]:
    """One chunk, in a thread of the pool."""
    rows = read_rows(descriptor, job.source, first, count)
    if job.verbatim:
        return rows
    if api is None:
        if not job.source.is_quantized:
            _check_bits(rows, job.source)
        return rows
    values = to_float32(rows, job.source.dtype)
    _check_largest(max(float(values.max()), -float(values.min())), job)
    if job.kind == _Type.F16:
        return _to_float16(api, values)
    return quantize(api, values, job.kind, job.importance)


def _to_float16(api: Ggml, values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The nearest F16 of each value: as ggml's quantizer and numpy have it, 25 times faster."""
    halves = np.empty(values.shape, np.float16)
    api.cpu_fp32_to_fp16(values.ctypes.data, halves.ctypes.data, values.size)
    return halves


def _check_bits(rows: NDArray[Any], source: SourceTensor) -> None:
    """Raise OrthrusError if a number that is only copied is not finite."""
    magnitude, first_bad = _MAGNITUDE[source.dtype]
    bits = rows.view(np.uint32 if source.dtype == "F32" else np.uint16)
    if int((bits & bits.dtype.type(magnitude)).max()) >= first_bad:
        raise _not_finite(source)


def _check_largest(largest: float, job: Job) -> None:
    """Raise OrthrusError if this magnitude, NaN if any number is, does not fit the new type."""
    if not np.isfinite(largest):
        raise _not_finite(job.source)
    if largest >= _OVERFLOW.get(job.kind, _HALF_OVERFLOW):
        advice = "use --type f32" if job.kind == _Type.BF16 else "use --type bf16"
        raise OrthrusError(
            f"{job.source.path}: weight {job.source.name}: {largest:g} is too large for "
            f"{job.kind.name}; {advice}"
        )


def _not_finite(source: SourceTensor) -> OrthrusError:
    return OrthrusError(
        f"{source.path}: weight {source.name} holds NaN or infinity; the file is damaged: "
        "download it again"
    )
