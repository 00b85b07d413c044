"""What GPU checks are about: the machine, checks, figures; and how time is taken."""

from __future__ import annotations

import time
from dataclasses import dataclass

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
            raise SystemExit("GPU check: --cpu needs TRITON_INTERPRET=1")
        return Machine("cpu", "interpreter", 86, True, None)
    if not torch.cuda.is_available():
        raise SystemExit("GPU check: no CUDA device (--cpu runs the logic without one)")
    major, minor = torch.cuda.get_device_capability()
    speed = None if quick else measure_copy("cuda")
    return Machine("cuda", torch.cuda.get_device_name(), major * 10 + minor, quick, speed)
