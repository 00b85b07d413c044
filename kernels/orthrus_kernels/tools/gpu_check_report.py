"""What gpu_check is about: the machine, checks, figures, and the table of them."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import triton


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


Item = Check | Figure


def measure_copy(device: str) -> float:
    """Bytes per second (read + written) of a plain device copy of 1 GiB: the practical ceiling."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = median_time(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds * 1e3


def median_time(launch: object) -> float:
    """Median milliseconds of a callable on the GPU, the L2 cache flushed between calls.

    Without a GPU: of one call, so that the logic around it runs; the number means nothing.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        launch()  # type: ignore[operator]
        return (time.perf_counter() - start) * 1e3
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
    speed = None if quick else measure_copy("cuda")
    return Machine("cuda", torch.cuda.get_device_name(), major * 10 + minor, quick, speed)


@dataclass
class Results:
    """What is known so far."""

    machine: Machine
    checks: list[Check] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)

    def add(self, item: Item) -> None:
        """Keep and print one item."""
        if isinstance(item, Check):
            self.checks.append(item)
            print(f"{'ok    ' if item.passed else 'FAILED'} {item.name} {item.detail}", flush=True)
        else:
            self.figures.append(item)
            print(f"{item.name}: {item.value:.4g} {item.unit} {item.note}", flush=True)

    def remark(self, text: str) -> None:
        """Keep and print something that a reader of the table must know."""
        self.remarks.append(text)
        print(text, file=sys.stderr, flush=True)

    @property
    def passed(self) -> bool:
        """Whether every check so far holds."""
        return all(check.passed for check in self.checks)

    def table(self) -> str:
        """Everything, in Markdown."""
        speed = self.machine.copy_bytes_per_second
        lines = [
            f"# {self.machine.name} (sm_{self.machine.capability}), torch {torch.__version__}, "
            f"triton {triton.__version__}",
            "",
            f"Copy ceiling: {speed / 1e9:.0f} GB/s" if speed else "No copy ceiling was measured.",
            "",
            *(f"- {remark}" for remark in self.remarks),
            "",
            "| check | result | detail |",
            "|---|---|---|",
            *(
                f"| {c.name} | {'ok' if c.passed else '**FAILED**'} | {c.detail} |"
                for c in self.checks
            ),
            "",
            "| figure | value | unit | note |",
            "|---|---|---|---|",
            *(f"| {f.name} | {f.value:.4g} | {f.unit} | {f.note} |" for f in self.figures),
            "",
        ]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """gpu_check.md and gpu_check.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu_check.md").write_text(self.table())
        (folder / "gpu_check.json").write_text(json.dumps(dataclasses.asdict(self), indent=1))
