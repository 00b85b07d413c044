"""The matrix products as cases for `tools.offline`: a short list, how to make more."""

from __future__ import annotations

from typing import Any

from gguf import GGMLQuantizationType

from orthrus_kernels.elementwise.cases import row_targets
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, STEP, TRAITS, Layout
from orthrus_kernels.products import a8 as matmul_a8
from orthrus_kernels.products import a16 as matmul_a16
from orthrus_kernels.products import dequantize as matmul_dequantize
from orthrus_kernels.products.dispatch import INT8_TYPES, Tile, Use, safe_tile
from orthrus_kernels.products.matmul import kind_of
from orthrus_kernels.tools.offline import CAPABILITIES, KernelCase

_T = GGMLQuantizationType
ROWS = (16, 32, 64)
"""The row tiles."""

EVERY = CAPABILITIES
BOTH = (86, 90)  # the two targets; the others get the main types only, to keep the tests short
GEFORCE = (86, 89, 120)  # where int8 products are used


def _planes(prefix: str, layout: Layout, kind: GGMLQuantizationType) -> dict[str, str]:
    code = {Layout.A16: "*u16", Layout.A8: "*u8"}[layout]
    if kind in PLAIN_TYPES:
        code = "*fp16" if kind == _T.F16 else "*bf16"
    return {
        f"{prefix}main": code,
        f"{prefix}high": code,
        f"{prefix}scales": "*u32",
        f"{prefix}supers": "*u32",
    }


def _activations(layout: Layout) -> dict[str, str]:
    if layout is Layout.A16:
        return {"x": "*fp16", "x_stride": "i32:16"}
    return {
        "x": "*i8",
        "x_scales": "*fp32",
        "x_sums": "*fp32",
        "groups": "i32:16",
        **{name: kind for name, kind in row_targets(True).items() if name.endswith("stride")},
    }


def _constants(layout: Layout, tile: Tile, asm: bool) -> dict[str, Any]:
    constants: dict[str, Any] = {"ASM": asm, "BM": tile.rows, "BN": tile.n}
    if layout is Layout.A8:
        constants |= {"K_TAIL": False, "STAGES": tile.stages}
    return constants


def _case(
    name: str,
    functions: dict[Layout, Any],
    layout: Layout,
    tile: Tile,
    capabilities: tuple[int, ...],
    signature: dict[str, str],
    constants: dict[str, Any],
    kind: GGMLQuantizationType,
    asm: bool = True,
) -> KernelCase:
    return KernelCase(
        f"{name} {layout.value} {tile.rows} rows" + ("" if asm else " (no asm)"),
        functions[layout],
        {"rows": "i32", "steps": "i32", **_activations(layout), **signature},
        {**_constants(layout, tile, asm), **constants},
        num_warps=tile.warps,
        num_stages=tile.stages,
        weights_per_iteration=tile.n * (STEP // 2 if kind in PLAIN_TYPES else STEP),
        capabilities=capabilities,
    )


_MATMUL = {Layout.A16: matmul_a16.matmul_a16, Layout.A8: matmul_a8.matmul_a8}
_GATE_UP = {Layout.A16: matmul_a16.gate_up_a16, Layout.A8: matmul_a8.gate_up_a8}
_HEAD = {Layout.A16: matmul_a16.head_a16, Layout.A8: matmul_a8.head_a8}


VARIANTS = {
    "matmul": Use.MATMUL,
    "logits": Use.MATMUL,
    "gate+up": Use.GATE_UP,
    "gate+up to int8": Use.GATE_UP,
    "head": Use.HEAD,
}
"""What is made of the sums, and whose tile it takes. logits: a product that is not split."""

PAIRS = (
    (_T.Q4_K, _T.Q6_K),
    (_T.Q5_K, _T.Q6_K),
    (_T.Q3_K, _T.Q5_K),
    (_T.Q2_K, _T.Q4_K),
    (_T.IQ4_XS, _T.Q5_K),
)
"""Types of Q and K, and of V, in llama.cpp's mixes: one launch for both."""


def product_cases(
    variant: str,
    kind: GGMLQuantizationType,
    layout: Layout,
    rows: int,
    only: tuple[int, ...] = CAPABILITIES,
    second: GGMLQuantizationType | None = None,
    tiles: dict[Tile, tuple[int, ...]] | None = None,
    asm: bool = True,
) -> list[KernelCase]:
    """Cases of one of VARIANTS, one per tile: `tiles`, or the safe ones of the architectures.

    `second` continues the columns of a "matmul" with a matrix of another type.
    """
    name = variant.replace("gate+up", f"gate+up {kind.name}")
    if "gate+up" not in variant:
        name = f"{variant} {kind.name}" + (f"+{second.name}" if second else "")
    if variant in ("matmul", "logits"):
        functions, signature, constants = _matmul(kind, layout, second, variant)
    elif variant == "head":
        functions, signature, constants = _head(kind, layout)
    else:
        functions, signature, constants = _gate_up(kind, layout, variant.endswith("int8"))
    if tiles is None:
        tiles = {}
        for capability in only:
            tile = safe_tile(layout, kind, rows, capability, VARIANTS[variant], second)
            tiles[tile] = (*tiles.get(tile, ()), capability)
    return [
        _case(name, functions, layout, tile, capabilities, signature, constants, kind, asm)
        for tile, capabilities in tiles.items()
    ]


Parts = tuple[dict[Layout, Any], dict[str, str], dict[str, Any]]
"""Kernels, signature, constants."""


def _matmul(
    kind: GGMLQuantizationType,
    layout: Layout,
    second: GGMLQuantizationType | None,
    variant: str,
) -> Parts:
    signature = {
        **_planes("a_", layout, kind),
        **_planes("b_", layout, second or kind),
        "out": "*fp32",
        "a_n": "i32:16",
        "b_n": "i32:16",
        "split_stride": "i32:16",
    }
    split = 2 if variant == "matmul" else 1
    constants = {"A": kind_of(kind), "B": kind_of(second) if second else None, "SPLIT": split}
    return _MATMUL, signature, constants


def _gate_up(kind: GGMLQuantizationType, layout: Layout, int8: bool) -> Parts:
    targets = row_targets(int8, "" if layout is Layout.A16 else "out_")
    targets |= {"out_scales": targets.pop("scales"), "out_sums": targets.pop("sums")}
    signature = {**_planes("", layout, kind), **targets, "n_rows": "i32:16"}
    return _GATE_UP, signature, {"KIND": kind_of(kind), "INT8": int8}


def _head(kind: GGMLQuantizationType, layout: Layout) -> Parts:
    signature = {
        **_planes("", layout, kind),
        "values": "*fp32",
        "tokens": "*i32",
        "n_rows": "i32:16",
    }
    return _HEAD, signature, {"KIND": kind_of(kind)}


def _other_cases() -> list[KernelCase]:
    """Kernels beside the products."""
    kernels = {
        Layout.A16: matmul_dequantize._dequantize_a16,
        Layout.A8: matmul_dequantize._dequantize_a8,
    }
    return [
        KernelCase(
            f"dequantize {kind.name} {layout.value}",
            kernels[layout],
            {
                **_planes("", layout, kind),
                "out": "*fp16",
                "n_rows": "i32:16",
                "steps": "i32",
                "row_stride": "i32:16",
            },
            {"KIND": kind_of(kind), "BN": 64},
            capabilities=(86,),
        )
        for kind in (_T.Q4_K, _T.Q6_K)
        for layout in Layout
    ]


def _short_list() -> tuple[KernelCase, ...]:
    cases: list[KernelCase] = []
    for kind in (*TRAITS, *PLAIN_TYPES):
        main = kind in (_T.Q4_K, _T.Q6_K)
        for rows in ROWS if main else (32,):
            only = EVERY if rows == 32 and main else BOTH
            cases += product_cases("matmul", kind, Layout.A16, rows, only)
            if kind in INT8_TYPES:
                wide = rows == 32 and kind in (_T.Q4_K, _T.Q8_0)
                cases += product_cases("matmul", kind, Layout.A8, rows, GEFORCE if wide else (86,))
    for layout, cards in ((Layout.A16, BOTH), (Layout.A8, (86,))):
        gate_up = "gate+up" if layout is Layout.A16 else "gate+up to int8"
        cases += product_cases("matmul", _T.Q4_K, layout, 32, cards, second=_T.Q6_K)
        cases += product_cases("matmul", _T.Q6_K, layout, 32, (86,), asm=False)
        cases += product_cases(gate_up, _T.Q4_K, layout, 32, cards)
        cases += product_cases("head", _T.Q6_K, layout, 32, cards)
    return (*cases, *_other_cases())


CASES = _short_list()
"""A selection that a test compiles every time; all of them: matrix.py."""
