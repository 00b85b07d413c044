"""compute-sanitizer over the first checks, where the CUDA toolkit has it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from orthrus_kernels.tools.gpu_check_report import Check, Machine

TOOLS = ("memcheck", "racecheck")
SECONDS = 60
"""Limit of one tool: kernels run many times slower under it."""


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, or None."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/opt/cuda/bin"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def checks(machine: Machine) -> Iterator[Check]:
    """One check per tool; none where there is nothing to check with, which is said."""
    if machine.device == "cpu":
        return
    tool = find_sanitizer()
    if tool is None:
        yield Check("compute-sanitizer", True, "not installed here: nothing was checked")
        return
    for name in TOOLS:
        yield sanitized(tool, name)


def sanitized(tool: str, name: str) -> Check:
    """The quick checks under one tool; running out of time is no failure, but said."""
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "--tool", name, "--error-exitcode", "86", "--target-processes", "all"]
        command += [
            sys.executable,
            "-m",
            "orthrus_gguf.bench.gpu_stage",
            "environment",
            "--quick",
        ]
        process = subprocess.Popen(
            [*command, "--items", f"{folder}/items"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool, and the Python under it
            process.communicate()
            return Check(f"compute-sanitizer {name}", True, f"not finished after {SECONDS} s")
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    detail = lines[-1].strip("= ") if lines else f"exit code {process.returncode}"
    return Check(f"compute-sanitizer {name}", process.returncode == 0, detail)
