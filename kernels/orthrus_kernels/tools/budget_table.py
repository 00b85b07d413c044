"""What the kernels may use (budgets.json), and the table of what they do use.

    python -m orthrus_kernels.tools.budget_table            compile a selection, check it
    python -m orthrus_kernels.tools.budget_table --all      compile everything, check, write RESOURCES.md
    python -m orthrus_kernels.tools.budget_table --accept   take today's figures as budgets (also: --all)

Compiled kernels are cached by triton: --all takes up to an hour on two cores the first time (run it
under `nice`), minutes later on, and goes on where a run was broken off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from orthrus_kernels.tools.offline import (
    CAPABILITIES,
    SHARED_MEMORY_LIMIT,
    Resources,
    report_module,
)

MODULES = (
    "orthrus_kernels.products.cases",
    "orthrus_kernels.attention.cases",
    "orthrus_kernels.elementwise.cases",
    "orthrus_kernels.sampling.cases",
)
"""Modules whose CASES are compiled."""

MATRIX = "orthrus_kernels.products.matrix"
"""All matrix products: with --all."""

HEADROOM = 1.03
"""--accept allows this much more than today, for other triton versions."""

Report = Mapping[str, Mapping[int, Resources]]


@dataclass(frozen=True)
class Budget:
    """Most that one kernel may use on one architecture."""

    registers: int
    shared: int  # bytes
    instructions_per_weight: float | None


Budgets = Mapping[str, Mapping[int, Budget]]


def budgets_path() -> Path:
    """The checked-in budgets."""
    return Path(__file__).parent / "budgets.json"


def load_budgets(path: Path | None = None) -> Budgets:
    """{kernel: {capability: Budget}}."""
    data = json.loads((path or budgets_path()).read_text())
    return {
        name: {int(capability): Budget(*values) for capability, values in by_capability.items()}
        for name, by_capability in data.items()
    }


def violations(name: str, capability: int, used: Resources, budget: Budget | None) -> list[str]:
    """What a kernel does that it must not, one line each."""
    where = f"{name} sm_{capability}"
    found = []
    if budget is None:
        found.append(
            f"{where}: no budget (run python -m orthrus_kernels.tools.budget_table --accept)"
        )
    else:
        if used.registers > budget.registers:
            found.append(f"{where}: {used.registers} registers, budget {budget.registers}")
        if used.shared > budget.shared:
            found.append(f"{where}: {used.shared} bytes shared, budget {budget.shared}")
        limit, per_weight = budget.instructions_per_weight, used.instructions_per_weight
        if limit is not None and (per_weight is None or per_weight > limit):
            found.append(f"{where}: {per_weight} instructions per weight, budget {limit}")
    if used.stack or used.spills:
        found.append(f"{where}: {used.stack} bytes of stack, {used.spills} spill instructions")
    if used.shared > SHARED_MEMORY_LIMIT[capability] * 1024:
        found.append(f"{where}: {used.shared} bytes shared do not fit the card")
    return found + (product_violations(where, capability, used) if _is_product(used) else [])


def product_violations(where: str, capability: int, used: Resources) -> list[str]:
    """What only the matrix products must keep."""
    found = []
    if used.mma + used.wgmma == 0:
        found.append(f"{where}: no MMA")
    if used.async16 == 0:
        found.append(f"{where}: weights are not copied 16 bytes at a time")
    if used.loop_i2f:
        found.append(f"{where}: {used.loop_i2f} int-to-float conversions in the loop")
    if any(warps != (used.num_warps, 1) for warps in used.warps_per_cta):
        found.append(f"{where}: warps {used.warps_per_cta} share rows or split K")
    return found


def _is_product(used: Resources) -> bool:
    return used.instructions_per_weight is not None


def check(report: Report, budgets: Budgets) -> list[str]:
    """All violations of a report."""
    return [
        line
        for name, by_capability in report.items()
        for capability, used in by_capability.items()
        for line in violations(name, capability, used, budgets.get(name, {}).get(capability))
    ]


def accepted(report: Report) -> dict[str, dict[str, list[Any]]]:
    """Budgets that a report just meets, as JSON."""
    return {
        name: {
            str(capability): [
                min(255, int(used.registers * HEADROOM) + 1),
                used.shared,
                None
                if used.instructions_per_weight is None
                else round(used.instructions_per_weight * HEADROOM, 2),
            ]
            for capability, used in sorted(by_capability.items())
        }
        for name, by_capability in sorted(report.items())
    }


def markdown(report: Report) -> str:
    """The table: a row per kernel, a column per architecture."""
    lines = [
        "# Kernel resources",
        "",
        "Written by `python -m orthrus_kernels.tools.budget_table --all` (offline compiler, "
        f"triton {triton.__version__}; no GPU involved). Each kernel at the tile that `dispatch` "
        "chooses: registers per thread · KiB of shared memory, and for the matrix products · "
        "instructions of the hot loop per thread and weight. No kernel here has a stack or spills; "
        "every product uses MMAs (wgmma on sm_90), copies weights 16 bytes at a time, converts no "
        "integers to floats in its loop and splits no K over warps.",
        "",
        "| kernel | " + " | ".join(f"sm_{capability}" for capability in CAPABILITIES) + " |",
        "|---" * (1 + len(CAPABILITIES)) + "|",
    ]
    for name, by_capability in sorted(report.items()):
        cells = [_cell(by_capability.get(capability)) for capability in CAPABILITIES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(used: Resources | None) -> str:
    if used is None:
        return ""
    weight = used.instructions_per_weight
    text = f"{used.registers} · {used.shared / 1024:.1f}"
    return text if weight is None else f"{text} · {weight:.2f}"


def compile_everything(
    modules: Sequence[str] = MODULES, talk: bool = False
) -> dict[str, dict[int, Resources]]:
    """Reports of all modules, merged; talk: a line per kernel as it is done."""
    report: dict[str, dict[int, Resources]] = {}
    for module in modules:
        for name, by_capability in report_module(module, talk=talk).items():
            report.setdefault(name, {}).update(by_capability)
    return report


def accept(report: Report) -> None:
    """Write the budgets that the report just meets; those of other kernels stay."""
    budgets = json.loads(budgets_path().read_text())
    for name, by_capability in accepted(report).items():
        budgets.setdefault(name, {}).update(by_capability)
    lines = [f"{json.dumps(name)}: {json.dumps(budgets[name])}" for name in sorted(budgets)]
    budgets_path().write_text("{\n " + ",\n ".join(lines) + "\n}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, check, write."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_kernels.tools.budget_table")
    parser.add_argument("--all", action="store_true", help="every product; writes the table")
    parser.add_argument("--accept", action="store_true", help="take today's figures as budgets")
    parser.add_argument(
        "--table",
        type=Path,
        default=Path("kernels/RESOURCES.md"),
        help="where --all writes the table (default: kernels/RESOURCES.md, from the root)",
    )
    options = parser.parse_args(arguments)
    report = compile_everything((*MODULES, MATRIX) if options.all else MODULES, talk=options.all)
    if options.accept:
        accept(report)
    if options.all:
        options.table.write_text(markdown(report))
    problems = check(report, load_budgets())
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
