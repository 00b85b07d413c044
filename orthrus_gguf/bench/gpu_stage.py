"""One stage of a first run on a GPU, in a process of its own (`gpu_first_run` starts them).

    python -m orthrus_gguf.bench.gpu_stage environment --items FILE [--cpu]

Every check and figure is a line on stdout and, as JSON, in FILE, at once: what a stage has found
stays known however it ends. Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from orthrus_kernels.overlap import CAPABILITY, PDL
from orthrus_kernels.tools import gpu_check_matmul, gpu_check_ops, gpu_check_times
from orthrus_kernels.tools.gpu_check_report import Check, Figure, Item, find_machine

from orthrus_gguf.bench import gpu_checks, gpu_figures, gpu_hybrid, gpu_sanitizer

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden/tiny-orthrus-stdlib.json"

GOLDEN_DRAFTER = GOLDEN.with_name("dflash.json")

Stage = Callable[[argparse.Namespace], Iterator[Item]]


def environment(options: argparse.Namespace) -> Iterator[Item]:
    """Versions, the card, its copy ceiling, and the two products of a Q4_K_M file."""
    machine = find_machine(options.cpu, options.quick)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    python = f"Python {platform.python_version()}, {os.cpu_count()} processors"
    where = f"{machine.name} (sm_{machine.capability})"
    yield Check(where, True, f"{versions}, CUDA {torch.version.cuda}, {python}")
    if machine.copy_bytes_per_second:
        yield Figure("copy ceiling", machine.copy_bytes_per_second / 1e9, "GB/s")
    yield from gpu_check_matmul.smoke_checks(machine)


def demo(options: argparse.Namespace) -> Iterator[Item]:
    """Text, row invariance and graphs of the demo model."""
    yield from _runtime_checks(options, ("f16",))


def drafter(options: argparse.Namespace) -> Iterator[Item]:
    """A drafter's network beside the demo model: drafts, text and graphs."""
    golden = json.loads(GOLDEN_DRAFTER.read_text())
    extent = gpu_checks.SMALL if options.cpu else gpu_checks.FULL
    for kind in ("f16", "q8_0"):
        yield from gpu_checks.drafter_checks(
            options.demo, options.drafter, golden, _device(options), extent, kind
        )


def generation(options: argparse.Namespace) -> Iterator[Item]:
    """A real shape: tokens per second, and passes at a short context."""
    yield from gpu_figures.figures(options.model, _device(options), None)


def contexts(options: argparse.Namespace) -> Iterator[Item]:
    """The same passes at 4k and 32k."""
    yield from gpu_figures.figures(options.model, _device(options), gpu_figures.CONTEXTS[1:])


def profile(options: argparse.Namespace) -> Iterator[Item]:
    """Which kernels an AR pass spends its time in."""
    yield from gpu_figures.profile(options.model, _device(options))


def checks(options: argparse.Namespace) -> Iterator[Item]:
    """Attention, norms, sampling; quantized caches; products of every other type."""
    machine = find_machine(options.cpu, options.quick)
    yield from gpu_check_ops.checks(machine)
    yield from _runtime_checks(options, ("q8_0", "q4_0"))
    yield from gpu_check_matmul.other_checks(machine)


def overlap(options: argparse.Namespace) -> Iterator[Item]:
    """The demo model's text and the passes of a short context again, with kernels that start before
    their predecessor has ended (its process has ORTHRUS_PDL=1)."""
    begins = PDL.value and find_machine(options.cpu, options.quick).capability >= CAPABILITY
    yield Check("kernels start early", True, "yes" if begins else "no: not on this card")
    yield from _runtime_checks(options, ("f16",))
    contexts = gpu_figures.CONTEXTS[:1]
    for figure in gpu_figures.figures(options.model, _device(options), contexts):
        yield replace(figure, name=f"starting early: {figure.name}")


def tiles(options: argparse.Namespace) -> Iterator[Item]:
    """What other tiles and chunks would give, and times of single kernels."""
    machine = find_machine(options.cpu, options.quick)
    yield from gpu_check_times.tuner_figures(machine)
    yield from gpu_figures.chunk_trial(options.model, _device(options))
    yield from gpu_check_times.packing_figures(machine)
    yield from gpu_check_ops.figures(machine)


def sanitizer(options: argparse.Namespace) -> Iterator[Item]:
    """compute-sanitizer over the first stage."""
    yield from gpu_sanitizer.checks(find_machine(options.cpu, True))


def hybrid(options: argparse.Namespace) -> Iterator[Item]:
    """Text, states and graphs of a small hybrid; then passes and speed of a real shape."""
    extent = gpu_checks.SMALL if options.cpu else gpu_checks.FULL
    yield from gpu_hybrid.checks(options.hybrid, _device(options), extent)
    yield from gpu_figures.figures(options.large_hybrid, _device(options), None)


STAGES: dict[str, Stage] = {
    stage.__name__: stage
    for stage in (
        environment,
        demo,
        drafter,
        generation,
        contexts,
        profile,
        checks,
        overlap,
        tiles,
        sanitizer,
        hybrid,
    )
}


def _device(options: argparse.Namespace) -> str | None:
    return "cpu" if options.cpu else None


def _runtime_checks(options: argparse.Namespace, kinds: Sequence[str]) -> Iterator[Item]:
    golden = json.loads(GOLDEN.read_text())
    extent = gpu_checks.SMALL if options.cpu else gpu_checks.FULL
    yield from gpu_checks.checks(options.demo, golden, _device(options), extent, kinds)


def _inject(kind: str) -> None:
    """What a stage must not do, for the tests of whoever starts it."""
    if kind == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if kind == "hang":
        time.sleep(3600)
    print("\x00\xff{]" * 1000, "item {", sep="\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_gguf.bench.gpu_stage")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--items", type=Path, required=True, help="checks and figures go here")
    parser.add_argument("--demo", type=Path, help="the converted demo checkpoint")
    parser.add_argument("--drafter", type=Path, help="the converted demo drafter")
    parser.add_argument("--model", type=Path, help="the file that is timed")
    parser.add_argument("--hybrid", type=Path, help="a small hybrid")
    parser.add_argument("--large-hybrid", type=Path, help="one that is timed")
    parser.add_argument("--cpu", action="store_true", help="the logic, on stand-ins")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--inject", choices=["raise", "hang", "garbage"], help="for tests")
    options = parser.parse_args(arguments)
    passed = True
    with options.items.open("a", encoding="utf-8") as items:
        for number, item in enumerate(STAGES[options.stage](options)):
            if isinstance(item, Check):
                passed &= item.passed
                print("ok    " if item.passed else "FAILED", item.name, item.detail, flush=True)
            else:
                print(f"{item.name}: {item.value:.4g} {item.unit} {item.note}", flush=True)
            kind = "check" if isinstance(item, Check) else "figure"
            items.write(json.dumps({"kind": kind, **asdict(item)}) + "\n")
            items.flush()
            if options.inject and number == 0:
                if options.inject == "garbage":
                    items.write('{"kind": "check", "name": \x00\n')
                _inject(options.inject)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
