"""Checks and figures on a GPU: one command, one table, within nine minutes.

    python -m orthrus_kernels.tools.gpu_check [--minutes 8.7] [--folder DIR]   the first CUDA device
    python -m orthrus_kernels.tools.gpu_check --quick --checks-only            small shapes
    TRITON_INTERPRET=1 python -m orthrus_kernels.tools.gpu_check --cpu         the logic, no device

Stages run in the order of what matters most, each until its time is up. Figures are reported only
if the checks before them hold. Every line is printed at once, and the table is written to DIR
(default: the current folder) as gpu_check.md and gpu_check.json after every stage, so that a run
that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orthrus_kernels.tools.gpu_check_report import (
    Check,
    Figure,
    Item,
    Machine,
    Results,
    find_machine,
    measure_copy,
    median_time,
)

__all__ = ["Check", "Figure", "Machine", "Stage", "find_machine", "main", "measure_copy",
           "median_time"]  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """`module.function(machine)` yields items, until `stop` of the time is gone (1 = all)."""

    name: str
    module: str
    function: str
    stop: float
    figures: bool


STAGES = (
    Stage("products", "gpu_check_matmul", "main_checks", 0.25, False),
    Stage("attention and small kernels", "gpu_check_ops", "checks", 0.33, False),
    Stage("times of products", "gpu_check_times", "figures", 0.55, True),
    Stage("times of the rest", "gpu_check_ops", "figures", 0.62, True),
    Stage("products of other types", "gpu_check_matmul", "other_checks", 0.77, False),
    Stage("tuner", "gpu_check_times", "tuner_figures", 0.87, True),
    Stage("compute-sanitizer", "gpu_check_sanitizer", "checks", 1.0, False),
)


class TimeUp(BaseException):
    """The clock ran out in the middle of an item: not an error of what was running."""


def _time_up(number: int, frame: object) -> None:
    raise TimeUp


def run_stage(stage: Stage, results: Results, deadline: float) -> None:
    """Items of a stage until the deadline; an exception is a check that failed."""
    module = importlib.import_module(f"orthrus_kernels.tools.{stage.module}")
    items: Iterator[Item] = getattr(module, stage.function)(results.machine)
    try:
        for item in items:
            results.add(item)
            if time.monotonic() > deadline:
                results.remark(f"{stage.name}: cut off, its time was up after {item.name}")
                break
    except Exception as error:
        results.add(Check(stage.name, False, f"{type(error).__name__}: {str(error)[:300]}"))
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_kernels.tools.gpu_check")
    parser.add_argument("--cpu", action="store_true", help="run the logic in the interpreter")
    parser.add_argument("--quick", action="store_true", help="small shapes, few figures")
    parser.add_argument("--checks-only", action="store_true", help="no figures, no sanitizer")
    parser.add_argument("--minutes", type=float, default=8.7, help="stop after (default: 8.7)")
    parser.add_argument("--folder", type=Path, default=Path("."))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; exit code 1 if a check failed."""
    start = time.monotonic()
    options = parse(arguments)
    # `timeout` and schedulers end a run with SIGTERM: leave through the `finally` below.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # A compiler that hangs, or a tool, may outlast its stage.
    signal.signal(signal.SIGALRM, _time_up)
    signal.alarm(int(60 * options.minutes) + 10)
    results = Results(find_machine(options.cpu, options.quick))
    if options.cpu:
        results.remark("interpreter: the logic ran; no time in this table means anything")
    try:
        for stage in STAGES:
            if options.checks_only and (stage.figures or stage.module == "gpu_check_sanitizer"):
                continue
            if stage.figures and not results.passed:
                results.remark(f"{stage.name}: left out, a check failed")
                continue
            run_stage(stage, results, start + 60 * options.minutes * stage.stop)
            results.write(options.folder)
    except TimeUp:
        results.remark(f"cut off after {options.minutes} minutes, in: {stage.name}")
    finally:
        signal.alarm(0)
        results.remark(f"{time.monotonic() - start:.0f} s")
        results.write(options.folder)
        print("\n" + results.table(), flush=True)
    return 0 if results.passed else 1


if __name__ == "__main__":
    sys.exit(main())
