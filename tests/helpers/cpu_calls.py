"""Calls of the CPU kernels as data, to run them in this process or in another one (`driver.c`):
on a made-up machine of another kind, or under sanitizers. Compared bit for bit."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import (
    LAYER_CACHE,
    LAYER_STATE,
    MATRICES,
    ROW,
    RUN,
    STATE_ROW,
    Kernels,
    Matrix,
    Step,
)

Bytes = NDArray[np.uint8]


class Ref(NamedTuple):
    """A place in a buffer of a case."""

    buffer: int
    offset: int = 0


STEP_POINTERS = (
    *("x", "y", "q", "weight", "weight_k", "row", "cache", "group", "index"),
    *("state_row", "state", "run"),
)

#: Lists of int32 that records point to: the field with their length, and the pointer.
LISTS: dict[Any, dict[str, str]] = {
    ROW: {"copies": "more_keys"},
    STATE_ROW: {"replays": "replay"},
    RUN: {"applied": "apply"},
}

FUNCTIONS = ("repack", "quantize", "product", "unpack_row", "run")
ARGUMENTS = 10

#: Of `repack`, which the package itself runs as a step only.
REPACK: tuple[Any, ...] = (ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int] * 4, ctypes.c_void_p)


@dataclass
class Case:
    """buffers: memory. pointers: places that hold the address of another place. calls: function and
    arguments, of which `Ref` are addresses; `run` takes a number of threads. outputs: the buffers
    to look at afterwards, with the type of what is in them.
    """

    name: str
    buffers: list[Bytes] = field(default_factory=list)
    pointers: list[tuple[Ref, Ref]] = field(default_factory=list)
    calls: list[tuple[str, tuple[int | Ref, ...]]] = field(default_factory=list)
    outputs: dict[int, Any] = field(default_factory=dict)

    def put(self, array: NDArray[Any]) -> int:
        """A buffer with a copy of an array."""
        self.buffers.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        return len(self.buffers) - 1

    def get(self, n_bytes: int, dtype: Any = np.uint8) -> int:
        """A buffer full of rubbish, whose contents count afterwards."""
        self.buffers.append(np.full(n_bytes, 0x5A, np.uint8))
        self.outputs[len(self.buffers) - 1] = dtype
        return len(self.buffers) - 1

    def call(self, function: str, *arguments: int | Ref) -> None:
        self.calls.append((function, arguments))


def run_here(kernels: Kernels, case: Case) -> list[NDArray[Any]]:
    """The outputs of a case, on an object that is loaded."""
    library, data = kernels.library, [buffer.copy() for buffer in case.buffers]
    library.orthrus_repack.argtypes = list(REPACK)

    def address(ref: Ref) -> int:
        assert 0 <= ref.offset <= data[ref.buffer].nbytes
        return int(data[ref.buffer].ctypes.data + ref.offset)

    for place, target in case.pointers:
        data[place.buffer][place.offset : place.offset + 8].view(np.uint64)[0] = address(target)
    for function, arguments in case.calls:
        values = [address(a) if isinstance(a, Ref) else a for a in arguments]
        if function == "run":
            pool = library.orthrus_pool_new(values[0])
            assert library.orthrus_run(pool, values[1], values[2]) == 0
            library.orthrus_pool_free(pool)
        else:
            getattr(library, f"orthrus_{function}")(*values)
    return [data[i].view(dtype) for i, dtype in case.outputs.items()]


def run_driver(
    command: Sequence[str], cases: Sequence[Case], **kw: Any
) -> list[list[NDArray[Any]]]:
    """The outputs of cases, by a program made of `driver.c`."""
    parts: list[bytes] = []

    def numbers(*values: int) -> None:
        parts.append(np.array(values, np.int64).tobytes())

    numbers(len(cases))
    for case in cases:
        numbers(len(case.buffers))
        for buffer in case.buffers:
            numbers(buffer.nbytes)
            parts.append(buffer.tobytes())
        numbers(len(case.pointers))
        for place, target in case.pointers:
            numbers(*place, *target)
        numbers(len(case.calls))
        for function, arguments in case.calls:
            numbers(FUNCTIONS.index(function))
            for argument in (*arguments, *[0] * (ARGUMENTS - len(arguments))):
                numbers(*(argument if isinstance(argument, Ref) else (-1, argument)))
    done = subprocess.run([*command], input=b"".join(parts), capture_output=True, **kw)
    assert done.returncode == 0, (done.returncode, done.stderr.decode()[-3000:])
    memory, at, found = np.frombuffer(done.stdout, np.uint8), 0, []
    for case in cases:
        outputs = []
        for i, buffer in enumerate(case.buffers):
            if i in case.outputs:
                outputs.append(memory[at : at + buffer.nbytes].view(case.outputs[i]))
            at += buffer.nbytes
        found.append(outputs)
    assert at == memory.nbytes
    return found


def assert_same(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]], what: str) -> None:
    """Bit for bit, but for the payloads of NaN."""
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.dtype.kind == "f":
            nan = np.isnan(theirs)
            np.testing.assert_array_equal(np.isnan(ours), nan, f"{what}, output {i}")
            ours, theirs = np.where(nan, 0, ours), np.where(nan, 0, theirs)
        same = ours.tobytes() == theirs.tobytes()
        assert same, f"{what}, output {i}: {np.flatnonzero(ours != theirs)[:8]} differ"


# --- whole passes ---


class Recorder:
    """Stands for a loaded library; turns every pass that it runs into a case.

    memory: returns all arrays that the steps may point into, with the names of those to compare.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.memory: list[tuple[NDArray[Any], bool]] = []
        self.cases: list[Case] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def orthrus_run(self, pool: int, steps: int, count: int) -> int:
        if self.memory:  # else weights are being repacked
            raw: Any = (ctypes.c_uint8 * (ctypes.sizeof(Step) * count)).from_address(steps)
            listed = np.frombuffer(raw, np.uint8)
            self.cases.append(recorded([(listed, False), *self.memory], count))
        return int(self.library.orthrus_run(pool, steps, count))


def recorded(memory: Sequence[tuple[NDArray[Any], bool]], count: int) -> Case:
    """A case that runs the `count` steps in the first array, with what lies in memory now."""
    case = Case("pass")
    memory = [(array, compared) for array, compared in memory if array.nbytes]
    for array, _ in tuple(memory):
        memory += [(numbers, False) for numbers in _lists(array)]
    arrays = [array for array, _ in memory]
    bases = [array.ctypes.data for array in arrays]
    for array, compared in memory:
        number = case.put(array)
        if compared:
            case.outputs[number] = array.dtype if array.dtype.kind == "f" else np.uint8
    for number, array in enumerate(arrays):
        raw = case.buffers[number]
        for length, pointer in LISTS.get(array.dtype, {}).items():
            raw.view(array.dtype)[pointer][array[length] == 0] = 0
        for offset in _pointers(array, first=number == 0):
            value = int(raw[offset : offset + 8].view(np.uint64)[0])
            if value:
                case.pointers.append((Ref(number, offset), _place(value, arrays, bases)))
    case.call("run", 2, Ref(0), count)
    return case


def _lists(array: NDArray[Any]) -> Iterator[NDArray[np.int32]]:
    """Lists of numbers that records point to, where they lie."""
    for length, pointer in LISTS.get(array.dtype, {}).items():
        for row in array[array[length] > 0]:
            raw: Any = (ctypes.c_int32 * int(row[length])).from_address(int(row[pointer]))
            yield np.frombuffer(raw, np.int32)


def _place(address: int, arrays: Sequence[NDArray[Any]], bases: Sequence[int]) -> Ref:
    for number, (array, base) in enumerate(zip(arrays, bases, strict=True)):
        if base <= address < base + array.nbytes:
            return Ref(number, address - base)
    raise LookupError(f"{address:#x} is in no array")


def _pointers(array: NDArray[Any], *, first: bool) -> Iterator[int]:
    """Offsets of the addresses in an array of steps (the first one), rows or caches."""
    if first:
        size = ctypes.sizeof(Step)
        offsets = [getattr(Step, name).offset for name in STEP_POINTERS]
        offsets += [Step.bias.offset + 8 * i for i in range(MATRICES)]
        matrix = ctypes.sizeof(Matrix)
        offsets += [Step.matrix.offset + matrix * i + Matrix.data.offset for i in range(MATRICES)]
    elif array.dtype in (ROW, LAYER_CACHE, STATE_ROW, LAYER_STATE, RUN):
        size, fields = array.dtype.itemsize, array.dtype.fields
        assert fields is not None
        offsets = [fields[name][1] for name in fields if fields[name][0] == np.dtype(np.uintp)]
    else:
        return
    for start in range(0, array.nbytes, size):
        yield from (start + offset for offset in offsets)
