"""Cases of the attention, small-op, sampling and commit kernels for `orthrus_kernels.tools.offline`.

Shapes are those of Qwen3-8B (36 layers of 32 query and 8 kv heads of 128, width 4096, MLP 12288,
vocabulary 151936) unless the name says otherwise.
"""

from __future__ import annotations

from typing import Any

from orthrus_kernels.attention import attention
from orthrus_kernels.attention.kv_cache import FORMATS, HEAD_DIMS, QBLOCK, halves
from orthrus_kernels.elementwise import embedding, ops, rows
from orthrus_kernels.sampling import accept, sample
from orthrus_kernels.sampling import kernels as sample_kernels
from orthrus_kernels.tools.offline import CAPABILITIES, KernelCase


def _width(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _attention_case(type_name: str, head_dim: int) -> KernelCase:
    values = "*fp16" if type_name == "f16" else "*u8"
    tile, warps = attention.attention_tile(head_dim)
    low, high = halves(head_dim)
    return KernelCase(
        f"attention {type_name} d={head_dim}",
        attention._parts,
        {
            "q": "*fp16",
            "k_values": values,
            "k_scales": "*fp16",
            "v_values": values,
            "v_scales": "*fp16",
            "block_k": "*fp16",
            "block_v": "*fp16",
            "visible": "*i32",
            "block_first": "*i32",
            "block_stop": "*i32",
            "sums": "*fp32",
            "stats": "*fp32",
            "rows": "i32",
            "capacity": "i32",
            "block_capacity": "i32",
            "packed": "i32",
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
            "LANES": attention.LANES,
            "K_FORMAT": FORMATS[type_name],
            "V_FORMAT": FORMATS[type_name],
        },
        num_warps=warps,
        num_stages=attention.STAGES,
    )


def _row_targets(int8: bool) -> dict[str, str]:
    strides = ("row_stride", "group_stride", "scale_row_stride", "scale_group_stride")
    out = {"out": "*i8" if int8 else "*fp16", "scales": "*fp32", "sums": "*fp32"}
    return out | dict.fromkeys(strides, "i32:16")


def _combine_case(int8: bool) -> KernelCase:
    targets = _row_targets(int8)
    targets["group_sums"] = targets.pop("sums")
    return KernelCase(
        f"attention combine {'int8' if int8 else 'f16'}",
        attention._combine,
        {
            **targets,
            "sums": "*fp32",
            "stats": "*fp32",
            "visible": "*i32",
            "block_first": "*i32",
            "block_stop": "*i32",
            "packed": "i32",
        },
        {
            "HEADS": 8,
            "GROUP": 4,
            "D": 128,
            "WIDTH": 128,
            "CHUNK": attention.CHUNK,
            "LANES": attention.LANES,
            "INT8": int8,
        },
        num_warps=1,
    )


def _norm_case(int8: bool) -> KernelCase:
    pointers = dict.fromkeys(("partials", "residual", "weight"), "*fp32")
    strides = {"part_rows": "i32", "part_stride": "i32:16"}
    return KernelCase(
        f"residual_norm {'int8' if int8 else 'f16'}",
        ops._residual_norm,
        {**pointers, **strides, "eps": "fp32", **_row_targets(int8)},
        {"SPLITS": 4, "N": 4096, "WIDTH": 4096, "INT8": int8},
        num_warps=8,
    )


def _silu_case(int8: bool) -> KernelCase:
    strides = {"part_rows": "i32", "part_stride": "i32:16", "n": "i32:16"}
    return KernelCase(
        f"silu_multiply {'int8' if int8 else 'f16'}",
        ops._silu_multiply,
        {"gate": "*fp32", "up": "*fp32", **strides, **_row_targets(int8)},
        {"SPLITS": 1, "TILE": 1024, "INT8": int8},
    )


def _quantize_case() -> KernelCase:
    return KernelCase(
        "quantize_rows",
        ops._quantize_rows,
        {"x": "*fp16", "x_stride": "i32:16", "n": "i32:16", **_row_targets(True)},
        {"TILE": 1024},
    )


def _qkv_case(type_name: str) -> KernelCase:
    values = "*fp16" if type_name == "f16" else "*u8"
    return KernelCase(
        f"finish_qkv {type_name}",
        ops._finish_qkv,
        {
            **dict.fromkeys(("partials", "norms", "cos", "sin"), "*fp32"),
            **dict.fromkeys(("views", "positions"), "*i32"),
            **dict.fromkeys(("q", "k_scales", "v_scales", "block_k", "block_v"), "*fp16"),
            **dict.fromkeys(("k_values", "v_values"), values),
            **dict.fromkeys(("part_rows", "capacity", "block_capacity"), "i32"),
            "part_stride": "i32:16",
            "eps": "fp32",
        },
        {
            "SPLITS": 2,
            "N_HEAD": 32,
            "HEADS": 8,
            "D": 128,
            "WIDTH": 128,
            "K_FORMAT": FORMATS[type_name],
            "V_FORMAT": FORMATS[type_name],
        },
        num_warps=1,
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


def _plan_case() -> KernelCase:
    pointers = (
        *("state", "history", "segments", "alternatives", "views", "tokens", "positions"),
        *("visible", "block_first", "block_stop"),
    )
    return KernelCase(
        "plan_rows",
        rows._plan,
        {
            **dict.fromkeys(pointers, "*i32"),
            **dict.fromkeys(("n_segments", "mask_token", "capacity"), "i32"),
            "inv_freq": "*fp64",
            "cos": "*fp32",
            "sin": "*fp32",
            "rope_scale": "fp32",
        },
        {"HALF": 64, "WIDTH": 64},
        num_warps=1,
    )


def _sampling_cases() -> list[KernelCase]:
    tiles = 38  # of 4096 tokens
    sorted_keys: dict[str, Any] = {
        "keys": "*i64",
        "numbers": "*fp64",
        "integers": "*i64",
        "masses": "*fp64",
        "n": "i32",
        "stride": "i32:16",
        "mass_stride": "i32",
    }
    extract = {
        "out": "*i64",
        "integers": "*i64",
        "n": "i32:16",
        "stride": "i32:16",
        "out_stride": "i32:16",
    }
    keep = {"KEEP": sample.MAX_TOP_K}
    found = _width(tiles * sample.MAX_TOP_K)
    return [
        KernelCase(
            "sample penalize",
            sample_kernels.penalize,
            {
                "logits": "*fp32",
                "positions": "*i32",
                "history": "*i32",
                "numbers": "*fp64",
                "integers": "*i64",
                "n_vocab": "i32:16",
            },
            {"PROGRAMS": sample.ROW_PROGRAMS, "TILE": 64},
        ),
        KernelCase(
            "sample extract from logits",
            sample_kernels.extract,
            {"source": "*fp32", **extract},
            {"TILE": sample.EXTRACT_TILE, "FROM_KEYS": False, **keep},
            num_warps=8,
        ),
        KernelCase(
            "sample extract from keys",
            sample_kernels.extract,
            {"source": "*i64", **extract},
            {"TILE": found, "FROM_KEYS": True, **keep},
            num_warps=8,
        ),
        KernelCase(
            "sample pack keys",
            sample_kernels.pack_keys,
            {"logits": "*fp32", "keys": "*i64", "n_vocab": "i32:16"},
            {"TILE": 1024},
        ),
        KernelCase(
            "sample mass", sample_kernels.mass_of_tile, sorted_keys, {"TILE": sample.SORTED_TILE}
        ),
        KernelCase(
            "sample choose",
            sample_kernels.choose_in_tile,
            {**sorted_keys, "positions": "*i32", "best": "*fp64", "tokens": "*i32"},
            {"TILE": sample.SORTED_TILE, "TILES": 256},
        ),
        KernelCase(
            "sample greedy",
            sample_kernels.best_of_tile,
            {
                "logits": "*fp32",
                "best": "*fp64",
                "tokens": "*i32",
                "n_vocab": "i32:16",
                "stride": "i32",
            },
            {"TILE": sample.EXTRACT_TILE},
        ),
        KernelCase(
            "sample pick",
            sample_kernels.pick,
            {
                "best": "*fp64",
                "tokens": "*i32",
                "out": "*i32",
                "tiles": "i32",
                **dict.fromkeys(("best_row", "best_tile", "token_row", "token_tile"), "i32"),
            },
            {"WIDTH": 256},
        ),
    ]


def _commit_cases() -> list[KernelCase]:
    pointers = ("ar_tokens", "segments", "history", "stop_tokens", "state", "ring", "log")
    return [
        KernelCase(
            "accept",
            accept._accept,
            {
                **dict.fromkeys(pointers, "*i32"),
                **dict.fromkeys(("n_stop", "ring_size", "log_size"), "i32"),
            },
            {"WIDTH": 64},
            num_warps=1,
        ),
        KernelCase(
            "write_drafts",
            accept._write_drafts,
            {
                **dict.fromkeys(("tokens", "views", "positions", "history"), "*i32"),
                **dict.fromkeys(("rows", "size", "shift"), "i32"),
            },
            {"WIDTH": 64},
            num_warps=1,
        ),
    ]


CASES: tuple[KernelCase, ...] = (
    *(
        _attention_case(type_name, head_dim)
        for type_name in FORMATS
        for head_dim in HEAD_DIMS
        if type_name == "f16" or head_dim % QBLOCK == 0
    ),
    *(_combine_case(int8) for int8 in (False, True)),
    *(_norm_case(int8) for int8 in (False, True)),
    *(_silu_case(int8) for int8 in (False, True)),
    _quantize_case(),
    *(_qkv_case(type_name) for type_name in FORMATS),
    *(_embed_case(type_name) for type_name in embedding.QBLOCK_BYTES),
    _plan_case(),
    *_sampling_cases(),
    *_commit_cases(),
)
"""Every kernel of this half of the package."""
