"""Processes of a first run on a GPU, started in the checkout, and the files that they make.

A process has a group of its own, so that it ends with all that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Runner:
    """Starts processes in the checkout, their output in files."""

    def __init__(self, folder: Path, *, cpu: bool) -> None:
        self.folder = folder
        self._environment = dict(os.environ)
        own = [str(ROOT / "kernels"), str(ROOT / "converters"), str(ROOT)]
        path = [*own, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment["PYTHONPATH"] = os.pathsep.join(path)
        self._environment["PYTHONUNBUFFERED"] = "1"
        self._environment.pop("TRITON_INTERPRET", None)
        if cpu:
            self._environment["TRITON_INTERPRET"] = "1"

    def start(self, log: str, *words: str, switch: str = "") -> subprocess.Popen[bytes]:
        """`python -m words`, in a process group of its own."""
        environment = self._environment | ({switch: "1"} if switch else {})
        with (self.folder / f"{log}.log").open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def last_line(self, log: str) -> str:
        """The last thing that a process said."""
        path = self.folder / f"{log}.log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = ["".join(c for c in line if c.isprintable()) for line in text.splitlines()]
        return next((line for line in reversed(lines) if line.strip()), "nothing was said")[:300]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code; None if it needs longer."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


@dataclass(frozen=True)
class Made:
    """A file that the converter makes. source: its arguments before the file's path, and behind."""

    name: str
    path: Path
    source: tuple[str, ...]
    kind: str

    def start(self, runner: Runner) -> subprocess.Popen[bytes]:
        """Complete, or not there at all."""
        words = ("orthrus_converters", *self.source, str(self.path), "--type", self.kind)
        return runner.start(f"convert-{self.name}", *words)


class Files:
    """Files that stages need: small ones are made at once, large ones in the background, one after
    the other."""

    def __init__(self, runner: Runner, small: Sequence[Made], large: Sequence[Made]) -> None:
        self._runner = runner
        self.failed: dict[str, str] = {}
        for one in small:
            if not one.path.exists() and one.start(runner).wait() != 0:
                self._note(one)
        self._queue = [one for one in large if not one.path.exists()]
        self._process: subprocess.Popen[bytes] | None = None
        self._next()

    def _note(self, one: Made) -> None:
        self.failed[one.name] = self._runner.last_line(f"convert-{one.name}")

    def _next(self) -> None:
        self._process = self._queue[0].start(self._runner) if self._queue else None

    def lacks(self, name: str, seconds: float) -> tuple[str, str] | None:
        """Wait for a file; how that ended and why, unless it is there."""
        until = time.monotonic() + seconds
        while self._process is not None and name in (one.name for one in self._queue):
            code = wait(self._process, max(until - time.monotonic(), 0.0))
            if code is None:
                return "too late", self._runner.last_line(f"convert-{self._queue[0].name}")
            one = self._queue.pop(0)
            if code != 0:
                self._note(one)
            self._next()
        return ("no model", self.failed[name]) if name in self.failed else None

    def close(self) -> None:
        """End what is being made."""
        if self._process is not None:
            end(self._process)
