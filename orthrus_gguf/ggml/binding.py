"""The part of ggml's C API that this project calls, as typed ctypes functions.

Every ggml object is an opaque address (an `int`); no structure is read or written from Python
except the three fields that `ggml_init` takes by value. That keeps the binding independent of
struct layouts, which change between ggml versions.
Source: ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h of ggml 0.20.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_PTR = ctypes.c_void_p
_STR = ctypes.c_char_p
_BOOL = ctypes.c_bool
_INT = ctypes.c_int
_I64 = ctypes.c_int64
_SIZE = ctypes.c_size_t
_F32 = ctypes.c_float

#: Bytes set aside for `ggml_threadpool_params`, which only ggml reads and writes (it is 532).
THREADPOOL_PARAMS_BYTES = 4096

#: `ggml_rope_ext`'s modes: element 2i rotates with element 2i + 1, or i with i + n_dims / 2 (NeoX).
ROPE_ADJACENT, ROPE_HALVES = 0, 2

#: `ggml_status` of a graph that ran to its end.
STATUS_SUCCESS = 0


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`: the memory of a context (for tensor headers, not their data)."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _PTR), ("no_alloc", _BOOL))


#: Name without the `ggml_` prefix -> (result type, argument types).
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # library
    "version": (_STR, ()),
    # types
    "blck_size": (_I64, (_INT,)),
    "row_size": (_SIZE, (_INT, _I64)),
    # quantization
    "quantize_requires_imatrix": (_BOOL, (_INT,)),
    "quantize_chunk": (_SIZE, (_INT, _PTR, _PTR, _I64, _I64, _I64, _PTR)),
    "cpu_fp32_to_fp16": (None, (_PTR, _PTR, _I64)),
    # contexts and tensors
    "init": (_PTR, (InitParams,)),
    "free": (None, (_PTR,)),
    "used_mem": (_SIZE, (_PTR,)),
    "tensor_overhead": (_SIZE, ()),
    "new_tensor_1d": (_PTR, (_PTR, _INT, _I64)),
    "new_tensor_2d": (_PTR, (_PTR, _INT, _I64, _I64)),
    "get_data": (_PTR, (_PTR,)),
    "nbytes": (_SIZE, (_PTR,)),
    "set_input": (None, (_PTR,)),
    "set_output": (None, (_PTR,)),
    # views
    "reshape_2d": (_PTR, (_PTR, _PTR, _I64, _I64)),
    "reshape_3d": (_PTR, (_PTR, _PTR, _I64, _I64, _I64)),
    "reshape_4d": (_PTR, (_PTR, _PTR, _I64, _I64, _I64, _I64)),
    "view_1d": (_PTR, (_PTR, _PTR, _I64, _SIZE)),
    "view_2d": (_PTR, (_PTR, _PTR, _I64, _I64, _SIZE, _SIZE)),
    "view_3d": (_PTR, (_PTR, _PTR, _I64, _I64, _I64, _SIZE, _SIZE, _SIZE)),
    "permute": (_PTR, (_PTR, _PTR, _INT, _INT, _INT, _INT)),
    # operations
    "add": (_PTR, (_PTR, _PTR, _PTR)),
    "mul": (_PTR, (_PTR, _PTR, _PTR)),
    "mul_mat": (_PTR, (_PTR, _PTR, _PTR)),
    "concat": (_PTR, (_PTR, _PTR, _PTR, _INT)),
    "get_rows": (_PTR, (_PTR, _PTR, _PTR)),
    "set_rows": (_PTR, (_PTR, _PTR, _PTR, _PTR)),
    "rms_norm": (_PTR, (_PTR, _PTR, _F32)),
    "swiglu_split": (_PTR, (_PTR, _PTR, _PTR)),
    "rope_ext": (
        _PTR,
        (_PTR, _PTR, _PTR, _PTR, _INT, _INT, _INT, _F32, _F32, _F32, _F32, _F32, _F32),
    ),
    "clamp": (_PTR, (_PTR, _PTR, _F32, _F32)),
    "soft_max_ext": (_PTR, (_PTR, _PTR, _PTR, _F32, _F32)),
    "flash_attn_ext": (_PTR, (_PTR, _PTR, _PTR, _PTR, _PTR, _F32, _F32, _F32)),
    # graphs
    "new_graph_custom": (_PTR, (_PTR, _SIZE, _BOOL)),
    "graph_overhead_custom": (_SIZE, (_SIZE, _BOOL)),
    "graph_n_nodes": (_INT, (_PTR,)),
    "build_forward_expand": (None, (_PTR, _PTR)),
    "gallocr_new": (_PTR, (_PTR,)),
    "gallocr_free": (None, (_PTR,)),
    # Versions differ in whether its result is a status or a yes: look at the buffer's size.
    "gallocr_reserve": (_INT, (_PTR, _PTR)),
    "gallocr_alloc_graph": (_BOOL, (_PTR, _PTR)),
    "gallocr_get_buffer_size": (_SIZE, (_PTR, _INT)),
    # buffers
    "backend_cpu_buffer_type": (_PTR, ()),
    "backend_buft_get_alignment": (_SIZE, (_PTR,)),
    "backend_cpu_buffer_from_ptr": (_PTR, (_PTR, _SIZE)),
    "backend_buffer_free": (None, (_PTR,)),
    "backend_tensor_alloc": (_INT, (_PTR, _PTR, _PTR)),
    # CPU backend and threads
    "backend_cpu_init": (_PTR, ()),
    "backend_free": (None, (_PTR,)),
    "backend_cpu_set_n_threads": (None, (_PTR, _INT)),
    "backend_cpu_set_threadpool": (None, (_PTR, _PTR)),
    "backend_cpu_set_use_ref": (None, (_PTR, _BOOL)),
    "backend_graph_compute": (_INT, (_PTR, _PTR)),
    "threadpool_params_init": (None, (_PTR, _INT)),
    "threadpool_new": (_PTR, (_PTR,)),
    "threadpool_free": (None, (_PTR,)),
}


class Ggml:
    """ggml's functions as attributes, without their `ggml_` prefix: `api.mul_mat(context, a, b)`.

    Pointers go in and come out as `int` (0 or None is NULL). ggml checks its arguments with
    GGML_ASSERT, which aborts the process: callers validate first.
    """

    def __init__(self, handle: ctypes.CDLL) -> None:
        """Raises AttributeError, naming the function, when the library lacks one."""
        for name, (result, arguments) in PROTOTYPES.items():
            function = getattr(handle, "ggml_" + name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # Only reached for names without a prototype; typed so that checkers accept the others.
        raise AttributeError(f"no prototype for ggml_{name} in binding.py")

    def new_context(self, n_bytes: int) -> int:
        """A context with room for `n_bytes` of tensor and graph headers. Free it with `free`."""
        context: int | None = self.init(InitParams(n_bytes, None, True))
        if not context:
            raise MemoryError(f"ggml_init: no memory for {n_bytes} bytes of tensor headers")
        return context
