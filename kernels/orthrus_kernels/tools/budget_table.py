"""What the kernels use on each card (budgets.json), and the check that they go on doing so.

    python -m orthrus_kernels.tools.budget_table            compile a selection, check it
    python -m orthrus_kernels.tools.budget_table --all      compile everything, check it
    python -m orthrus_kernels.tools.budget_table --changed  compile what differs from what was
                                                            accepted, check it (also: --all)
    python -m orthrus_kernels.tools.budget_table --accept   take today's figures (also: --all)
    python -m orthrus_kernels.tools.budget_table --print    print what is known; compiles nothing

budgets.json is the truth, for each minor version of triton, and sources.json says of which sources
(only where nothing was wrong); kernels/RESOURCES.md shows a part of it. --accept writes all three.
Another compiler than PINNED, in a folder on PYTHONPATH (tests/requirements-triton36.txt), compiles
a short list for two cards.
Compiled kernels are cached by triton: --all takes up to an hour on two cores the first time (run it
under `nice`), minutes later on, and goes on where a run was broken off.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus_kernels.tools.offline import (
    CAPABILITIES,
    SHARED_MEMORY_LIMIT,
    KernelCase,
    Resources,
    load_cases,
    report_module,
    source_key,
)

MODULES = (
    "orthrus_kernels.products.cases",
    "orthrus_kernels.attention.cases",
    "orthrus_kernels.elementwise.cases",
    "orthrus_kernels.recurrence.cases",
    "orthrus_kernels.sampling.cases",
)
"""Modules whose CASES are compiled."""

MATRIX = "orthrus_kernels.products.matrix"
"""All matrix products: with --all."""

HEADROOM = 1.03
"""Tolerated beyond the accepted figures, for other triton versions."""

PINNED = "3.7"
"""The version of triton whose budgets cover everything."""

OTHERS_CAPABILITIES = (86, 90)
"""What other versions are checked for."""

Report = Mapping[str, Mapping[int, Resources]]


@dataclass(frozen=True)
class Budget:
    """What one kernel uses on one architecture; `HEADROOM` more is tolerated."""

    registers: int
    shared: int  # bytes
    instructions_per_weight: float | None

    @property
    def most_registers(self) -> int:
        return min(255, int(self.registers * HEADROOM) + 1)

    @property
    def most_per_weight(self) -> float | None:
        per_weight = self.instructions_per_weight
        return None if per_weight is None else round(per_weight * HEADROOM, 2)


Budgets = Mapping[str, Mapping[int, Budget]]


def budgets_path() -> Path:
    """The checked-in budgets."""
    return Path(__file__).parent / "budgets.json"


def sources_path() -> Path:
    """`source_key` of what was accepted, for each minor version of triton."""
    return Path(__file__).parent / "sources.json"


def compiler() -> str:
    """Minor version of the triton that is installed."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def in_short_list(name: str) -> bool:
    """What other versions of triton compile: products of Q4_K and Q6_K, attention with heads of
    128, all small kernels."""
    if " a16" in name or " a8" in name:
        return (" Q4_K" in name or " Q6_K" in name) and "asm" not in name
    return "d=" not in name or "d=128" in name


def load_budgets(path: Path | None = None, version: str = PINNED) -> Budgets:
    """{kernel: {capability: Budget}}."""
    data = json.loads((path or budgets_path()).read_text()).get(version, {})
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
        if used.registers > budget.most_registers:
            found.append(f"{where}: {used.registers} registers, budget {budget.most_registers}")
        if used.shared > budget.shared:
            found.append(f"{where}: {used.shared} bytes shared, budget {budget.shared}")
        limit, per_weight = budget.most_per_weight, used.instructions_per_weight
        if limit is not None and (per_weight is None or per_weight > limit):
            found.append(f"{where}: {per_weight} instructions per weight, budget {limit}")
    if used.stack or used.spills:
        found.append(f"{where}: {used.stack} bytes of stack, {used.spills} spill instructions")
    if used.shared > SHARED_MEMORY_LIMIT[capability] * 1024:
        found.append(f"{where}: {used.shared} bytes shared do not fit the card")
    attention = re.fullmatch(r"attention \S+ d=(\d+).*", name)
    if attention is not None:
        found += attention_violations(where, capability, used, int(attention[1]))
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
    return found + ([f"{where}: no wgmma"] if capability == 90 and not used.wgmma else [])


def attention_violations(where: str, capability: int, used: Resources, head_dim: int) -> list[str]:
    """MMAs with no warp on another's keys (heads of up to 128), wide asynchronous copies, no
    conversions."""
    found = []
    if used.mma + used.wgmma == 0:
        found.append(f"{where}: no MMA")
    if used.async16 == 0:
        found.append(f"{where}: keys are not copied 16 bytes at a time")
    if used.loop_i2f:
        found.append(f"{where}: {used.loop_i2f} int-to-float conversions in the loop")
    if head_dim <= 128 and used.warps_per_cta != ((4, 1),):
        found.append(f"{where}: warps {used.warps_per_cta} share keys")
    if head_dim <= 128 and capability == 90 and not used.wgmma:
        found.append(f"{where}: no wgmma")
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
    """The figures of a report, as JSON."""
    return {
        name: {
            str(capability): [
                used.registers,
                used.shared,
                None
                if used.instructions_per_weight is None
                else round(used.instructions_per_weight, 2),
            ]
            for capability, used in sorted(by_capability.items())
        }
        for name, by_capability in sorted(report.items())
    }


MAIN_KERNELS = (
    "matmul Q4_K a16 16 rows",
    "matmul Q4_K a16 32 rows",
    "matmul Q4_K a8 32 rows",
    "matmul Q6_K a16 32 rows",
    "matmul Q8_0 a16 32 rows",
    "gate+up Q4_K a16 32 rows",
    "gate+up Q4_K to int8 a8 32 rows",
    "head Q6_K a16 32 rows",
    "attention f16 d=128",
    "attention q8_0 d=128",
    "finish_qkv f16",
    "residual_norm f16",
    "sample choose",
)
"""What RESOURCES.md shows."""


def summary(budgets: Budgets) -> str:
    """RESOURCES.md."""
    lines = [
        "# Kernel resources",
        "",
        "What the compiler (offline, no GPU involved) makes of the main kernels at the tile that"
        " `dispatch` chooses: registers per thread, and for the matrix products instructions of the"
        " hot loop per thread and weight. At full bandwidth an RTX 3090 (sm_86) affords about 11 of"
        " those, an H200 (sm_90) about 3.6.",
        "",
        *_table(budgets, MAIN_KERNELS, shared=False),
        "",
        "No kernel has a stack or spills, on any card: tests fail otherwise. Every product uses"
        " MMAs (wgmma on sm_90), copies weights 16 bytes at a time, converts no integers to floats"
        " in its loop and splits no K over warps.",
        "",
        "All kernels, with their shared memory:"
        " `PYTHONPATH=kernels python -m orthrus_kernels.tools.budget_table --print`. The figures"
        " that tests compare with are in `orthrus_kernels/tools/budgets.json`.",
    ]
    return "\n".join(lines) + "\n"


def _table(budgets: Budgets, names: Sequence[str], *, shared: bool) -> list[str]:
    """A row per kernel, a column per architecture."""
    cards = " | ".join(f"sm_{capability}" for capability in CAPABILITIES)
    lines = [f"| kernel | {cards} |", "|---" * (1 + len(CAPABILITIES)) + "|"]
    for name in names:
        by_capability = budgets[name]
        cells = [_cell(by_capability.get(capability), shared) for capability in CAPABILITIES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(used: Budget | None, shared: bool) -> str:
    if used is None:
        return ""
    parts = [str(used.registers)]
    if shared:
        parts.append(f"{used.shared / 1024:.1f} KiB")
    if used.instructions_per_weight is not None:
        parts.append(f"{used.instructions_per_weight:.2f}")
    return " · ".join(parts)


def compile_everything(
    modules: Sequence[str] = MODULES,
    talk: bool = False,
    *,
    short: bool = False,
    changed: bool = False,
) -> dict[str, dict[int, Resources]]:
    """Reports of all modules, merged; talk: a line per kernel as it is done. short: what is
    compiled with other versions of triton. changed: only what differs from what was accepted."""
    report: dict[str, dict[int, Resources]] = {}
    cards = OTHERS_CAPABILITIES if short else CAPABILITIES
    old = load_sources(compiler()) if changed else {}
    for module in modules:
        names = {
            case.name
            for case in load_cases(module)
            if (not short or in_short_list(case.name))
            and (not changed or _differs(case, cards, old.get(case.name, {})))
        }
        found = report_module(module, cards, talk=talk, wanted=names.__contains__) if names else {}
        for name, by_capability in found.items():
            report.setdefault(name, {}).update(by_capability)
    return report


def _differs(case: KernelCase, cards: Sequence[int], keys: Mapping[str, str]) -> bool:
    """Whether anything about it is not what was accepted, on any of these cards."""
    wanted = set(cards).intersection(case.capabilities)
    return any(keys.get(str(card)) != source_key(case, card) for card in wanted)


def load_sources(version: str) -> dict[str, dict[str, str]]:
    """{kernel: {capability: source_key}} of what was accepted without problems."""
    found: dict[str, dict[str, str]] = json.loads(sources_path().read_text()).get(version, {})
    return found


def keys_of(report: Report) -> dict[str, dict[str, str]]:
    """`source_key` of everything in a report, as JSON."""
    found: dict[str, dict[str, str]] = {}
    for case in (case for module in (*MODULES, MATRIX) for case in load_cases(module)):
        for card in sorted(set(case.capabilities).intersection(report.get(case.name, ()))):
            found.setdefault(case.name, {})[str(card)] = source_key(case, card)
    return found


def known_cases() -> dict[str, set[int]]:
    """Names of all cases, and the architectures that each is compiled for."""
    found: dict[str, set[int]] = {}
    for module in (*MODULES, MATRIX):
        for case in load_cases(module):
            found.setdefault(case.name, set()).update(case.capabilities)
    return found


def accept(report: Report, version: str) -> None:
    """Write the figures of a report, and of which sources they are where nothing is wrong with
    them; what is known of other kernels stays, as long as there are such."""
    _update(budgets_path(), version, accepted(report))
    budgets = load_budgets(version=version)
    good = {
        name: {
            card: used for card, used in by_card.items() if not check({name: {card: used}}, budgets)
        }
        for name, by_card in report.items()
    }
    _update(sources_path(), version, keys_of(good))


def _update(path: Path, version: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write values of kernels and cards; others stay, as long as there are such."""
    versions = json.loads(path.read_text())
    values = versions.setdefault(version, {})
    for name, by_capability in found.items():
        values.setdefault(name, {}).update(by_capability)
    known = known_cases()
    versions[version] = {
        name: {cap: value for cap, value in values[name].items() if int(cap) in known[name]}
        for name in sorted(values)
        if name in known
    }
    parts = []
    for one, kernels in sorted(versions.items()):
        lines = [f"{json.dumps(name)}: {json.dumps(by_card)}" for name, by_card in kernels.items()]
        parts.append(f"{json.dumps(one)}: {{\n " + ",\n ".join(lines) + "\n}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, check, write."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_kernels.tools.budget_table")
    parser.add_argument("--all", action="store_true", help="every product")
    parser.add_argument(
        "--changed", action="store_true", help="only what differs from sources.json"
    )
    parser.add_argument("--accept", action="store_true", help="take today's figures as budgets")
    parser.add_argument("--print", action="store_true", help="print all figures and stop")
    parser.add_argument(
        "--summary",
        type=Path,
        default=Path("kernels/RESOURCES.md"),
        help="what --accept writes for people (default: kernels/RESOURCES.md, from the root)",
    )
    options = parser.parse_args(arguments)
    version = compiler()
    if options.print:
        budgets = load_budgets(version=version)
        print("\n".join(_table(budgets, sorted(budgets), shared=True)))
        return 0
    modules = (*MODULES, MATRIX) if options.all else MODULES
    report = compile_everything(
        modules, talk=options.all, short=version != PINNED, changed=options.changed
    )
    if options.accept:
        accept(report, version)
        options.summary.write_text(summary(load_budgets()))
    problems = check(report, load_budgets(version=version))
    for line in problems:
        print(line, file=sys.stderr)
    print(f"triton {version}: {len(report)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
