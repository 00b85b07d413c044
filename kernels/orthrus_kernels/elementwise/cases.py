"""Cases of the small kernels for `orthrus_kernels.tools.offline`.

Shapes are those of Qwen3-8B (width 4096, MLP 12288, heads of 128).
"""

from __future__ import annotations

from orthrus_kernels.elementwise import embedding, ops, rows
from orthrus_kernels.tools.offline import CAPABILITIES, KernelCase


def row_targets(int8: bool, prefix: str = "") -> dict[str, str]:
    """Arguments of a kernel that writes rows of activations, as `new_int8_rows` lays them out."""
    strides = ("row_stride", "group_stride", "scale_row_stride", "scale_group_stride")
    out = {"out": "*i8" if int8 else "*fp16", "scales": "*fp32", "sums": "*fp32"}
    out |= dict.fromkeys((prefix + name for name in strides), "i32:16")
    if int8:
        out[f"{prefix}scale_row_stride"] = "1"
    return out


def _norm_case(int8: bool, indexed: bool = False) -> KernelCase:
    pointers = dict.fromkeys(("partials", "residual", "weight"), "*fp32")
    strides = {"part_rows": "i32", "part_stride": "i32:16"}
    return KernelCase(
        f"residual_norm {'int8' if int8 else 'f16'}" + (" of some rows" if indexed else ""),
        ops._residual_norm,
        {**pointers, "index": "*i32", **strides, "eps": "fp32", **row_targets(int8)},
        {"SPLITS": 4, "N": 4096, "WIDTH": 4096, "INT8": int8, "INDEXED": indexed},
        num_warps=8,
    )


def _silu_case(int8: bool, paired: int = 0) -> KernelCase:
    strides = {"part_rows": "i32", "part_stride": "i32:16", "n": "i32:16"}
    return KernelCase(
        f"silu_multiply {'int8' if int8 else 'f16'}" + (" of pairs" if paired else ""),
        ops._silu_multiply,
        {"gate": "*fp32", "up": "*fp32", **strides, **row_targets(int8)},
        {"SPLITS": 1, "PAIRED": paired, "TILE": 1024, "INT8": int8},
    )


def _quantize_case(int8: bool) -> KernelCase:
    return KernelCase(
        f"quantize_rows {'int8' if int8 else 'f16'}",
        ops._quantize_rows,
        {"x": "*fp32", "x_stride": "i32:16", "n": "i32:16", **row_targets(int8)},
        {"TILE": 1024, "INT8": int8},
    )


def _embed_case(type_name: str) -> KernelCase:
    return KernelCase(
        f"embed {type_name}",
        embedding._embed,
        {
            "table": "*u8",
            "tokens": "*i32",
            "codebook": "*fp32",
            "out": "*fp32",
            "row_bytes": "i32",
            "n": "i32:16",
        },
        {"TYPE": type_name, "TILE": 512},
        capabilities=CAPABILITIES if type_name in ("Q6_K", "IQ4_XS") else (86, 90),
    )


def _angles_case() -> KernelCase:
    return KernelCase(
        "rotary_angles",
        rows._angles,
        {
            "positions": "*i32",
            "inv_freq": "*fp64",
            "cos": "*fp32",
            "sin": "*fp32",
            "scale": "fp32",
        },
        {"HALF": 64, "WIDTH": 64},
        num_warps=1,
    )


CASES: tuple[KernelCase, ...] = (
    *(_norm_case(int8) for int8 in (False, True)),
    *(_norm_case(int8, indexed=True) for int8 in (False, True)),
    *(_silu_case(int8) for int8 in (False, True)),
    _silu_case(False, paired=8),
    *(_quantize_case(int8) for int8 in (False, True)),
    *(_embed_case(type_name) for type_name in embedding.QBLOCK_BYTES),
    _angles_case(),
)
