"""Checks and figures on a GPU: one command, one table.

    python -m orthrus_kernels.gpu_check [--quick] [--folder DIR]     on the first CUDA device
    TRITON_INTERPRET=1 python -m orthrus_kernels.gpu_check --cpu     the logic, on tiny shapes

Checks come first, and figures are reported only if all of them hold. The result is printed and
written to DIR (default: the current folder) as gpu_check.md and gpu_check.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

MODULES = ("orthrus_kernels.gpu_check_matmul", "orthrus_kernels.gpu_check_ops")
"""Modules with `checks(machine)` and `figures(machine)`; ops and attention add theirs here."""


@dataclass(frozen=True)
class Machine:
    """Where the checks run. `tiny`: the interpreter, or a quick look."""

    device: str
    name: str
    capability: int
    tiny: bool
    copy_bytes_per_second: float | None


@dataclass(frozen=True)
class Check:
    """One property that holds or does not."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Figure:
    """One measured number. `value` in `unit`; `note` may compare it with a bound."""

    name: str
    value: float
    unit: str
    note: str = ""


def measure_copy(device: str) -> float:
    """Bytes per second (read + written) of a plain device copy of 1 GiB: the practical ceiling."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = median_time(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds * 1e3


def median_time(launch: object) -> float:
    """Median milliseconds of a callable on the GPU, the L2 cache flushed between calls."""
    return float(triton.testing.do_bench(launch, warmup=10, rep=50, return_mode="median"))


def find_machine(cpu: bool, quick: bool) -> Machine:
    """The first CUDA device, or the interpreter."""
    if cpu:
        if not triton.knobs.runtime.interpret:
            raise SystemExit("gpu_check: --cpu needs TRITON_INTERPRET=1")
        return Machine("cpu", "interpreter", 86, True, None)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: no CUDA device (--cpu runs the logic without one)")
    major, minor = torch.cuda.get_device_capability()
    speed = measure_copy("cuda")
    return Machine("cuda", torch.cuda.get_device_name(), major * 10 + minor, quick, speed)


def report(machine: Machine, checks: Iterable[Check], figures: Iterable[Figure]) -> str:
    """The table, in Markdown."""
    speed = machine.copy_bytes_per_second
    lines = [
        f"# {machine.name} (sm_{machine.capability}), torch {torch.__version__}, "
        f"triton {triton.__version__}",
        "",
        f"Copy ceiling: {speed / 1e9:.0f} GB/s" if speed else "Interpreter: nothing is timed.",
        "",
        "| check | result | detail |",
        "|---|---|---|",
        *(f"| {c.name} | {'ok' if c.passed else '**FAILED**'} | {c.detail} |" for c in checks),
        "",
        "| figure | value | unit | note |",
        "|---|---|---|---|",
        *(f"| {f.name} | {f.value:.4g} | {f.unit} | {f.note} |" for f in figures),
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_kernels.gpu_check")
    parser.add_argument("--cpu", action="store_true", help="run the logic in the interpreter")
    parser.add_argument("--quick", action="store_true", help="small shapes, few figures")
    parser.add_argument("--folder", type=Path, default=Path("."))
    options = parser.parse_args(arguments)
    machine = find_machine(options.cpu, options.quick)
    checks: list[Check] = []
    figures: list[Figure] = []
    modules = [importlib.import_module(name) for name in MODULES]
    for module in modules:
        for check in module.checks(machine):
            print(
                f"{'ok    ' if check.passed else 'FAILED'} {check.name} {check.detail}", flush=True
            )
            checks.append(check)
    passed = all(check.passed for check in checks)
    if passed and not options.cpu:
        for module in modules:
            for figure in module.figures(machine):
                print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.note}", flush=True)
                figures.append(figure)
    text = report(machine, checks, figures)
    print("\n" + text)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "gpu_check.md").write_text(text)
    data = {
        "machine": dataclasses.asdict(machine),
        "checks": [dataclasses.asdict(check) for check in checks],
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }
    (options.folder / "gpu_check.json").write_text(json.dumps(data, indent=1))
    if not passed:
        print("gpu_check: a check failed, so nothing was timed", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
