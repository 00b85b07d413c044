"""Every matrix product that a launch can ask for, as cases for `orthrus_kernels.tools.offline`.

Every weight type, row tile, architecture and use, at the tile that `dispatch` chooses: more than a
thousand kernels, about an hour for two cores the first time (triton's cache keeps what is compiled,
also of a run that was broken off).
"""

from __future__ import annotations

from gguf import GGMLQuantizationType

from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, TRAITS, Layout
from orthrus_kernels.products.cases import PAIRS, ROWS, VARIANTS, product_cases
from orthrus_kernels.products.dispatch import HALF_RATE_SUMS, INT8_TYPES
from orthrus_kernels.tools.offline import CAPABILITIES, KernelCase


def layouts(kind: GGMLQuantizationType, capability: int) -> tuple[Layout, ...]:
    """int8 products are for the cards where they pay."""
    int8 = kind in INT8_TYPES and capability in HALF_RATE_SUMS
    return (Layout.A16, Layout.A8) if int8 else (Layout.A16,)


def variants(capability: int) -> tuple[str, ...]:
    """Uses of a product on a card: int8 rows come out only where something takes them."""
    int8 = capability in HALF_RATE_SUMS
    return tuple(name for name in VARIANTS if int8 or not name.endswith("int8"))


def _matrix() -> tuple[KernelCase, ...]:
    cases: list[KernelCase] = []
    for kind in (*TRAITS, *PLAIN_TYPES):
        for layout in Layout:
            only = tuple(c for c in CAPABILITIES if layout in layouts(kind, c))
            for rows in ROWS if only else ():
                for name in VARIANTS:
                    where = tuple(c for c in only if name in variants(c))
                    cases += product_cases(name, kind, layout, rows, where)
    for first, second in PAIRS:
        for layout in Layout:
            only = tuple(c for c in CAPABILITIES if layout in layouts(first, c))
            for rows in ROWS:
                cases += product_cases("matmul", first, layout, rows, only, second)
    return tuple(cases)


CASES = _matrix()
