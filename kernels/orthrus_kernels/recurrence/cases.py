"""Cases of the gated DeltaNet for `orthrus_kernels.tools.offline`.

Shapes are those of Qwen3.6-27B (16 key and 48 value heads of 128) unless the name says otherwise.
"""

from __future__ import annotations

from orthrus_kernels.elementwise.cases import row_targets
from orthrus_kernels.recurrence import delta_net
from orthrus_kernels.recurrence.states import COLUMNS, RUN, StateShape
from orthrus_kernels.tools.offline import KernelCase

_SHAPE = StateShape(48, 16, 48, 128, 35)
_SMALL = StateShape(18, 16, 16, 128, 35)


def _constants(s: StateShape) -> dict[str, int]:
    return {
        "KEYS": s.key_heads,
        "VALUES": s.value_heads,
        "D": s.head_dim,
        "RECORDS": s.records,
        "SIZE": s.record,
    }


def _convolve_case(s: StateShape, name: str = "") -> KernelCase:
    floats = ("inputs", "gates", "taps", "a", "dt", "memory", "mixed", "strengths")
    columns = ("views", "sequences", "record", "back_1", "back_2", "back_3")
    return KernelCase(
        f"delta convolve{name}",
        delta_net._convolve,
        {
            **dict.fromkeys(floats, "*fp32"),
            **dict.fromkeys(columns, "*i32"),
            "entries": "*i64",
            **dict.fromkeys(("part_rows", "gate_rows", "layer"), "i32"),
            **dict.fromkeys(("part_stride", "gate_stride"), "i32:16"),
        },
        {**_constants(s), "SPLITS": 1, "GATE_SPLITS": 8, "WIDTH": 64},
        num_warps=1,
    )


def _recur_case(s: StateShape, name: str = "") -> KernelCase:
    whole = ("table", "record", "replay_first", "replay_stop", "slots", "stamps")
    return KernelCase(
        f"delta recur{name}",
        delta_net._recur,
        {
            **dict.fromkeys(("mixed", "strengths", "memory", "out"), "*fp32"),
            **dict.fromkeys(whole, "*i32"),
            "entries": "*i64",
            **dict.fromkeys(("layer", "layers"), "i32"),
        },
        {**_constants(s), "COLUMNS": COLUMNS, "RUN": len(RUN)},
        num_warps=1,
    )


def _norm_case(int8: bool) -> KernelCase:
    return KernelCase(
        f"delta gated_norm {'int8' if int8 else 'f16'}",
        delta_net._gated_norm,
        {
            **dict.fromkeys(("x", "gates", "weight"), "*fp32"),
            "views": "*i32",
            "part_rows": "i32",
            "part_stride": "i32:16",
            "eps": "fp32",
            **row_targets(int8),
        },
        {"SPLITS": 1, "N": 6144, "D": 128, "INT8": int8},
        num_warps=1,
    )


CASES: tuple[KernelCase, ...] = (
    _convolve_case(_SHAPE),
    _convolve_case(_SMALL, " of 16 value heads"),
    _recur_case(_SHAPE),
    _recur_case(_SMALL, " of 16 value heads"),
    *(_norm_case(int8) for int8 in (False, True)),
)
