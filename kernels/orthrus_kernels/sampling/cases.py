"""Cases of the sampling kernels for `orthrus_kernels.tools.offline`: a vocabulary of 151,936."""

from __future__ import annotations

from typing import Any

from orthrus_kernels.sampling import kernels, sample
from orthrus_kernels.tools.offline import KernelCase

TILES = 38
"""Of 4096 tokens."""


def _width(n: int) -> int:
    return 1 << (n - 1).bit_length()


_SUMMARY = {
    "best": "*fp64",
    "tokens": "*i32",
    "second": "*fp64",
    "second_tokens": "*i32",
    "sums": "*fp64",
}
"""What tiles leave for `settle`."""


def _score_cases() -> list[KernelCase]:
    """Penalties, bans, masks; the best of a tile."""
    logits = {"logits": "*fp32", "n_vocab": "i32:16"}
    return [
        KernelCase(
            "sample penalize",
            kernels.penalize,
            {
                **logits,
                **dict.fromkeys(("windows", "window_first", "window_stop"), "*i32"),
                "numbers": "*fp64",
            },
            {"PROGRAMS": sample.ROW_PROGRAMS, "TILE": 64},
        ),
        KernelCase(
            "sample ban", kernels.ban, {**logits, "bans": "*i32", "n_bans": "i32"}, {"TILE": 128}
        ),
        KernelCase(
            "sample mask", kernels.mask, {**logits, "masks": "*i32", "words": "i32"}, {"TILE": 1024}
        ),
        *(
            KernelCase(
                "sample greedy" + (" in detail" if detail else ""),
                kernels.best_of_tile,
                {**logits, "modes": "*i32", **_SUMMARY, "stride": "i32"},
                {"TILE": sample.EXTRACT_TILE, "DETAIL": detail},
            )
            for detail in (False, True)
        ),
        KernelCase(
            "sample log sums",
            kernels.log_sum_of_tile,
            {**logits, "tops": "*fp64", "sums": "*fp64", "stride": "i32"},
            {"TILE": sample.EXTRACT_TILE},
        ),
    ]


def _extract_case(from_keys: bool) -> KernelCase:
    tile = _width(TILES * sample.MAX_TOP_K) if from_keys else sample.EXTRACT_TILE
    return KernelCase(
        f"sample extract from {'keys' if from_keys else 'logits'}",
        kernels.extract,
        {
            "source": "*i64" if from_keys else "*fp32",
            "out": "*i64",
            "modes": "*i32",
            "integers": "*i64",
            **dict.fromkeys(("n", "stride", "out_stride"), "i32:16"),
        },
        {"TILE": tile, "FROM_KEYS": from_keys, "KEEP": sample.MAX_TOP_K, "COUNT": 0},
        num_warps=8,
    )


def _choice_cases() -> list[KernelCase]:
    """From sorted keys to a token."""
    sorted_keys: dict[str, Any] = {
        "keys": "*i64",
        "modes": "*i32",
        "integers": "*i64",
        "masses": "*fp64",
        "n": "i32",
        "stride": "i32:16",
        "mass_stride": "i32",
    }
    mode = {"MODE": sample.SORTED, "TILE": sample.SORTED_TILE}
    tiles = dict.fromkeys(("greedy_tiles", "extracted_tiles", "sorted_tiles"), "i32")
    return [
        KernelCase(
            "sample pack keys",
            kernels.pack_keys,
            {"logits": "*fp32", "keys": "*i64", "n_vocab": "i32:16"},
            {"TILE": 1024},
        ),
        KernelCase("sample mass", kernels.mass_of_tile, sorted_keys, mode),
        *(
            KernelCase(
                "sample choose" + (" in detail" if detail else ""),
                kernels.choose_in_tile,
                {**sorted_keys, **_SUMMARY, "numbers": "*fp64", "positions": "*i32"},
                {**mode, "TILES": 256, "DETAIL": detail},
                num_warps=8,
            )
            for detail in (False, True)
        ),
        KernelCase(
            "sample settle",
            kernels.settle,
            {
                "modes": "*i32",
                **_SUMMARY,
                "out": "*i32",
                **tiles,
                "stride": "i32",
                "out_stride": "i32",
            },
            {"WIDTH": 256, "DETAIL": True},
            num_warps=1,
        ),
        KernelCase(
            "sample pick",
            kernels.pick,
            {
                "values": "*fp32",
                "tokens": "*i32",
                "out": "*i32",
                **dict.fromkeys(("tiles", "rows", "out_stride"), "i32"),
            },
            {"WIDTH": 4096},
            num_warps=8,
        ),
        KernelCase(
            "sample report",
            kernels.report,
            {
                "logits": "*fp32",
                "tops": "*fp64",
                "sums": "*fp64",
                "keys": "*i64",
                "out": "*i32",
                "n_vocab": "i32:16",
                **dict.fromkeys(("tiles", "stride", "out_stride"), "i32"),
                "key_stride": "i32:16",
            },
            {"WIDTH": 64, "TOP": 20, "SPAN": 32},
            num_warps=1,
        ),
    ]


CASES: tuple[KernelCase, ...] = (
    *_score_cases(),
    *(_extract_case(from_keys) for from_keys in (False, True)),
    *_choice_cases(),
)
