"""Cases of the attention kernels for `orthrus_kernels.tools.offline`.

Shapes are those of Qwen3-8B (32 query and 8 kv heads of 128) unless the name says otherwise.
"""

from __future__ import annotations

from orthrus_kernels.attention import attention, finish_qkv, kv_cache
from orthrus_kernels.attention.kv_cache import FORMATS, HEAD_DIMS, QBLOCK, halves
from orthrus_kernels.elementwise.cases import row_targets
from orthrus_kernels.tools.offline import KernelCase


def _planes(type_name: str) -> dict[str, str]:
    """The anchor in the types of the planes, and the table of caches."""
    values = "*fp16" if type_name == "f16" else "*u8"
    return {
        "entries": "*i64",
        **dict.fromkeys(("k_values", "v_values"), values),
        **dict.fromkeys(("k_scales", "v_scales"), "*fp16"),
    }


def _attention_case(type_name: str, head_dim: int, *, sliding: bool = False) -> KernelCase:
    tile, warps = attention.attention_tile(head_dim)
    low, high = halves(head_dim)
    return KernelCase(
        f"attention {type_name} d={head_dim}" + (" sliding" if sliding else ""),
        attention._parts,
        {
            "q": "*fp16",
            "tiles": "*i32",
            **_planes(type_name),
            "block_k": "*fp16",
            "block_v": "*fp16",
            "visible": "*i32",
            "block_first": "*i32",
            "block_stop": "*i32",
            "positions": "*i32",
            "sums": "*fp32",
            "stats": "*fp32",
            "layer": "i32",
            "block_capacity": "i32",
            "packed": "i32",
            "lanes": "i32",
            "back": "i32",
            "scale": "fp32",
        },
        {
            "HEADS": 8,
            "GROUP": 4,
            "LOW": low,
            "HIGH": high,
            "TILE": tile,
            "KEYS": attention.KEYS,
            "CHUNK": attention.CHUNK,
            "K_FORMAT": FORMATS[type_name],
            "V_FORMAT": FORMATS[type_name],
            "SLIDING": sliding,
            "CAUSAL": sliding,
        },
        num_warps=warps,
        num_stages=attention.STAGES,
    )


def _combine_case(int8: bool, head_dim: int = 128, gate_splits: int = 0) -> KernelCase:
    targets = row_targets(int8)
    targets["group_sums"] = targets.pop("sums")
    return KernelCase(
        f"attention combine {'int8' if int8 else 'f16'}" + (" gated" if gate_splits else ""),
        attention._combine,
        {
            **targets,
            "sums": "*fp32",
            "stats": "*fp32",
            "visible": "*i32",
            "block_first": "*i32",
            "block_stop": "*i32",
            "gates": "*fp32",
            **dict.fromkeys(("packed", "lanes", "part_rows"), "i32"),
            "part_stride": "i32:16",
        },
        {
            "HEADS": 8,
            "GROUP": 4,
            "D": head_dim,
            "WIDTH": head_dim,
            "CHUNK": attention.CHUNK,
            "INT8": int8,
            "GATE_SPLITS": gate_splits,
        },
        num_warps=1,
    )


def _qkv_case(
    type_name: str, name: str = "", *, norms: bool = True, biases: bool = False,
    adjacent: bool = False, n_head: int = 32, head_dim: int = 128, turned: int = 128,
    gated: bool = False,
) -> KernelCase:  # fmt: skip
    columns = ("views", "sequences", "places", "more_first", "more_stop", "more")
    return KernelCase(
        f"finish_qkv {type_name}{name}",
        finish_qkv._finish_qkv,
        {
            **dict.fromkeys(("partials", "norms", "biases", "cos", "sin"), "*fp32"),
            **dict.fromkeys(columns, "*i32"),
            **dict.fromkeys(("q", "block_k", "block_v"), "*fp16"),
            **_planes(type_name),
            **dict.fromkeys(("part_rows", "layer", "block_capacity"), "i32"),
            "part_stride": "i32:16",
            "eps": "fp32",
        },
        {
            "SPLITS": 2,
            "N_HEAD": n_head,
            "HEADS": 8,
            "D": head_dim,
            "WIDTH": head_dim,
            "K_FORMAT": FORMATS[type_name],
            "V_FORMAT": FORMATS[type_name],
            "NORMS": norms,
            "BIASES": biases,
            "ADJACENT": adjacent,
            "TURNED": turned,
            "GATED": gated,
        },
        num_warps=1,
    )


def _move_case(type_name: str) -> KernelCase:
    width = halves(128)[0] if type_name == "q4_0" else 128
    return KernelCase(
        f"move_columns {type_name}",
        kv_cache._move,
        {
            "entries": "*i64",
            "values": "*fp16" if type_name == "f16" else "*u8",
            "scales": "*fp16",
            "moves": "*i32",
        },
        {
            "FIRST": 0,
            "WIDTH": width,
            "SPAN": width,
            "GROUPS": 128 // QBLOCK,
            "FORMAT": FORMATS[type_name],
        },
        num_warps=1,
    )


CASES: tuple[KernelCase, ...] = (
    *(
        _attention_case(type_name, head_dim)
        for type_name in FORMATS
        for head_dim in HEAD_DIMS
        if type_name == "f16" or head_dim % QBLOCK == 0
    ),
    *(_attention_case(type_name, 128, sliding=True) for type_name in FORMATS),
    *(_combine_case(int8) for int8 in (False, True)),
    *(_combine_case(int8, head_dim=256, gate_splits=2) for int8 in (False, True)),
    *(_qkv_case(type_name) for type_name in FORMATS),
    _qkv_case("f16", " with biases", norms=False, biases=True),
    _qkv_case("f16", " in adjacent pairs", norms=False, adjacent=True),
    *(_qkv_case(type_name, " of k and v alone", n_head=0) for type_name in FORMATS),
    *(
        _qkv_case(type_name, " gated", n_head=24, head_dim=256, turned=64, gated=True)
        for type_name in FORMATS
    ),
    *(_move_case(type_name) for type_name in FORMATS),
)
