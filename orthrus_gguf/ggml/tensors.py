"""Tensors over memory that Python owns, and one-off graphs over them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.ggml.binding import STATUS_SUCCESS, Ggml

#: ggml's own alignment of tensor data (TENSOR_ALIGNMENT); its buffers refuse less.
ALIGNMENT = 32


def aligned_bytes(n_bytes: int) -> NDArray[np.uint8]:
    """Uninitialized memory at an address that ggml accepts for tensor data."""
    room = np.empty(n_bytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + n_bytes]


def array_at(address: int, dtype: Any, shape: Sequence[int]) -> NDArray[Any]:
    """A numpy view of tensor data at `address`. It must not outlive that memory."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * count).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def multiply_rows(api: Ggml, context: int, weights: int, x: int, columns: int, rows: int) -> int:
    """`weights` [outputs, columns] times `rows` rows of `x`; the result is [rows, 1, outputs].

    The rows lie along ggml's third dimension, not its second. Every kernel that computes several
    rows together, and then sums in another order (llamafile's, ARM's int8 matrix instructions, the
    tiled one of ggml 0.25), looks at the second, so each row gets the plain dot product that it
    would get alone. It costs nothing: the plain kernel walks both dimensions alike.
    """
    return int(api.mul_mat(context, weights, api.reshape_3d(context, x, columns, 1, rows)))


class Tensors:
    """A ggml context whose tensors use memory of the caller's, which must outlive it."""

    def __init__(self, api: Ggml, count: int) -> None:
        """Make room for `count` tensors (data not included)."""
        self._api = api
        self._stack = ExitStack()
        self.context = api.new_context(count * api.tensor_overhead() + 1024)
        self._stack.callback(api.free, self.context)

    def place(self, qtype: int, shape: tuple[int, ...], address: int) -> int:
        """A tensor of `shape` (numpy order, one or two sizes) over the bytes at `address`.

        Raises ValueError where ggml would abort.
        """
        rows, columns = (1, *shape)[-2:]
        whole = columns % self._api.blck_size(qtype) == 0
        if address % ALIGNMENT or rows < 1 or columns < 1 or not whole:
            raise ValueError(f"cannot place type {qtype}, shape {shape} at {address:#x}")
        if len(shape) == 1:
            tensor = self._api.new_tensor_1d(self.context, qtype, columns)
        else:
            tensor = self._api.new_tensor_2d(self.context, qtype, columns, rows)
        buffer = self._api.backend_cpu_buffer_from_ptr(address, self._api.nbytes(tensor))
        self._stack.callback(self._api.backend_buffer_free, buffer)
        self._api.backend_tensor_alloc(buffer, tensor, address)
        return int(tensor)

    def close(self) -> None:
        self._stack.close()


class Scratch:
    """A small graph that runs once: for tests of the library, not for speed.

    >>> with Scratch(api, threads=1) as s:
    ...     x = s.tensor(np.ones((3, 64), np.float32))
    ...     y = s.compute(api.rms_norm(s.context, x, 1e-6), (3, 64))
    """

    def __init__(self, api: Ggml, *, threads: int = 1, reference: bool = True) -> None:
        """reference: keep to ggml's plain kernels, as the runtime does."""
        self._api = api
        self._stack = ExitStack()
        self._tensors = Tensors(api, 256)
        self._stack.callback(self._tensors.close)
        self._data: list[NDArray[np.uint8]] = []
        self._backend = api.backend_cpu_init()
        self._stack.callback(api.backend_free, self._backend)
        api.backend_cpu_set_n_threads(self._backend, threads)
        api.backend_cpu_set_use_ref(self._backend, reference)
        self.context = self._tensors.context
        self._first: list[int] = []

    def tensor(
        self,
        values: NDArray[Any],
        qtype: gguf.GGMLQuantizationType | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> int:
        """A tensor holding a copy of `values`: an array, or bytes of `qtype` with their shape."""
        types = gguf.GGMLQuantizationType
        plain = {"f4": types.F32, "f2": types.F16, "i4": types.I32, "i8": types.I64}
        kind = plain[values.dtype.str[1:]] if qtype is None else qtype
        memory = aligned_bytes(values.nbytes)
        memory[:] = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self._data.append(memory)
        return self._tensors.place(int(kind), shape or values.shape, memory.ctypes.data)

    def first(self, tensor: int) -> None:
        """Have `tensor` computed before the result, which does not depend on it in the graph."""
        self._first.append(tensor)

    def compute(self, result: int, shape: Sequence[int]) -> NDArray[np.float32]:
        """Run the graph of `result`; return its float32 values in numpy order."""
        api, stack = self._api, self._stack
        graph = api.new_graph_custom(self._graph_context(256), 256, False)
        for tensor in [*self._first, result]:
            api.build_forward_expand(graph, tensor)
        api.set_output(result)
        allocator = api.gallocr_new(api.backend_cpu_buffer_type())
        stack.callback(api.gallocr_free, allocator)
        if not api.gallocr_alloc_graph(allocator, graph):
            raise MemoryError("no memory for a ggml graph")
        status = api.backend_graph_compute(self._backend, graph)
        if status != STATUS_SUCCESS:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        values: NDArray[np.float32] = array_at(api.get_data(result), np.float32, shape).copy()
        return values

    def _graph_context(self, nodes: int) -> int:
        context = self._api.new_context(self._api.graph_overhead_custom(nodes, False) + 1024)
        self._stack.callback(self._api.free, context)
        return context

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
