"""Loads the object for this machine, and mirrors `src/orthrus_cpu.h` and `src/steps.h`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

#: Environment variable: the object to load, by its name, instead of the best that the machine has.
ISA = "ORTHRUS_CPU_ISA"

#: Objects, the fastest first.
NAMES = ("avx512vnni", "avx2vnni", "avx2", "neoni8mm", "neon", "portable")

#: Where the build puts them.
FOLDER = Path(__file__).with_name("objects")

FORM_FLOAT, FORM_BLOCK, FORM_K = range(3)

EMBED, NORM, QUANTIZE, PRODUCT, GATED, HEADS, ATTENTION, PICK, SILU = range(9)
SIGMOID, CONVOLVE, RECUR, GATED_NORM, WEIGHTS, REPACK = range(9, 15)
OPERATIONS = 15
"""Operations of a step."""

PANELS_PER_TASK = 4
"""Panels of 16 columns that a task of a product covers (`src/steps.c`)."""

CHUNK_COLUMNS = 256
"""Columns whose scores attention keeps (`src/attention.c`)."""

MATRICES = 4
"""Matrices of one step (`src/steps.h`)."""

HEADS_PER_TASK = 8
"""Heads that a task of a convolution covers (`src/delta.c`)."""

WIDE = 2
"""Vectors of a tile of state, where the heads divide by them (`src/delta.c`)."""

LANES = 16
"""Columns of a panel; equally keys of a panel of the cache."""

_P = ctypes.c_void_p
_I = ctypes.c_int32


class Matrix(ctypes.Structure):
    """A repacked matrix."""

    _fields_ = (("type", _I), ("k", _I), ("columns", _I), ("panels", _I), ("data", _P))


class Step(ctypes.Structure):
    """One step of a pass; see `src/steps.h`."""

    _fields_ = (
        *((name, _I) for name in ("op", "tasks", "first", "rows", "width", "form", "count", "add")),
        *((name, _I) for name in ("n_head", "n_head_kv", "head_dim", "adjacent", "groups", "_")),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("x", _P),
        ("y", _P),
        ("x_stride", ctypes.c_size_t),
        ("y_stride", ctypes.c_size_t),
        ("q", _P),
        ("weight", _P),
        ("weight_k", _P),
        ("bias", _P * MATRICES),
        ("matrix", Matrix * MATRICES),
        ("row", _P),
        ("cache", _P),
        ("group", _P),
        ("index", _P),
        ("state_row", _P),
        ("state", _P),
        ("run", _P),
    )


ROW = np.dtype(
    [
        *((name, np.int32) for name in ("token", "cache", "key", "copies")),
        *((name, np.int32) for name in ("sees", "from", "to", "since")),
        ("more_keys", np.uintp),
        ("cos", np.uintp),
        ("sin", np.uintp),
    ]
)
"""One row of a pass."""

LAYER_CACHE = np.dtype(
    [
        *((name, np.uintp) for name in ("keys", "values")),
        ("columns", np.int64),
        *((name, np.int32) for name in ("type_k", "type_v")),
    ]
)
"""Keys and values of one layer of one cache."""

STATE_ROW = np.dtype(
    [
        ("back", np.int32, 3),
        *((name, np.int32) for name in ("state", "record", "follows", "replays", "_")),
        ("replay", np.uintp),
    ]
)
"""One row of a pass, for DeltaNet layers."""

LAYER_STATE = np.dtype([(name, np.uintp) for name in ("memory", "saved", "records")])
"""State of one DeltaNet layer of one sequence."""

RUN = np.dtype(
    [
        *((name, np.int32) for name in ("first", "count", "state", "applied", "advance", "save")),
        ("apply", np.uintp),
    ]
)
"""Rows of one sequence, for DeltaNet layers."""

GROUP = np.dtype([("first", np.int32), ("count", np.int32)])


SIZES = (
    *(ctypes.sizeof(Step), ROW.itemsize, ctypes.sizeof(Matrix)),
    *(LAYER_CACHE.itemsize, GROUP.itemsize, STATE_ROW.itemsize, LAYER_STATE.itemsize),
    *(RUN.itemsize, PANELS_PER_TASK, OPERATIONS),
)
"""What `orthrus_sizes` says of an object that was built with this module."""


class NoKernelsError(Exception):
    """There are no kernels for this machine. The message says why, in one line."""


@dataclass(frozen=True)
class Kernels:
    """A loaded object. isa: what it is for, in words."""

    path: Path
    isa: str
    library: ctypes.CDLL

    def form(self, type_number: int) -> int | None:
        """The form of activations that a GGUF type takes; None for types without kernels."""
        form = int(self.library.orthrus_form(type_number))
        return None if form < 0 else form

    def panel_bytes(self, type_number: int, k: int) -> int:
        """Bytes of 16 columns of a matrix of that type."""
        return int(self.library.orthrus_panel_bytes(type_number, k))

    def row_bytes(self, form: int, k: int) -> int:
        """Bytes of a row of activations."""
        return int(self.library.orthrus_row_bytes(form, k))


def built() -> list[str]:
    """Names of the objects that the build made, the fastest first."""
    return [name for name in NAMES if (FOLDER / f"{name}.so").exists()]


def load() -> Kernels:
    """The best object that this machine can run, or the one that $ORTHRUS_CPU_ISA names.

    Raises NoKernelsError.
    """
    found, named = built(), os.environ.get(ISA)
    if not found:
        raise NoKernelsError(
            "the CPU kernels were not built, for want of a C compiler: install gcc or clang, then"
            " repeat the pip install with --force-reinstall --no-deps --no-cache-dir"
        )
    if named and named not in found:
        raise NoKernelsError(f"{ISA}={named}: expected one of {', '.join(found)}")
    reasons = []
    for candidate in [named] if named else found:
        kernels = open_object(FOLDER / f"{candidate}.so")
        if isinstance(kernels, Kernels):
            return kernels
        reasons.append(f"{candidate}: {kernels}")
    raise NoKernelsError(f"no CPU kernels can be used: {'; '.join(reasons)}")


@cache
def open_object(path: Path) -> Kernels | str:
    """The object at `path`; in words what is wrong with it where it is of another version than this
    module, or needs instructions that this machine lacks."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"it cannot be loaded ({error})"
    sizes = (_I * len(SIZES))()
    library.orthrus_sizes(sizes)
    if tuple(sizes) != SIZES:
        return "it is of another version; build it anew"
    if not library.orthrus_usable():
        return "this machine lacks its instructions"
    library.orthrus_isa.restype = ctypes.c_char_p
    library.orthrus_panel_bytes.restype = library.orthrus_row_bytes.restype = ctypes.c_size_t
    library.orthrus_pool_new.restype = _P
    library.orthrus_pool_free.argtypes = (_P,)
    library.orthrus_run.argtypes = (_P, _P, ctypes.c_int)
    library.orthrus_run_here.argtypes = (_P,)
    library.orthrus_quantize.argtypes = (_I, _P, _I, _P)
    library.orthrus_product.argtypes = (
        *(_I, _P, _I, _I, _I, _P, _I, _P),
        *(ctypes.c_size_t, _I),
    )
    library.orthrus_unpack_row.argtypes = (_I, _P, _I, _I, _P)
    return Kernels(path, library.orthrus_isa().decode(), library)


def steps_array(steps: Sequence[Step]) -> ctypes.Array[Step]:
    """Steps side by side, as `orthrus_run` wants them."""
    return (Step * len(steps))(*steps)
