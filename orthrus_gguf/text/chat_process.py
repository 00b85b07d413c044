"""Processes that render chat templates (`chat_worker.py`), kept from one message to the next.

Starting one costs ten times what rendering does, so that who will need one prepares it. A process
that is idle is used again; one that died or outlived its limits is replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT = 2  # idle processes; more run while more messages are rendered at once


class EndedError(Exception):
    """The process ended without an answer; the message says how."""


class Worker:
    """A running `chat_worker.py`, which does one job at a time."""

    def __init__(self) -> None:
        """Raises OSError when it cannot be started."""
        # A file, since nobody reads a pipe while the process lives.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            # Isolated: no start-up file, variable or module of the current folder gets in.
            [sys.executable, "-I", str(Path(__file__).with_name("chat_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for us, and what it forks is ended with it
        )
        with suppress(OSError):  # it is dead, which a job will find out
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(sys.path).encode() + b"\n")
            self.process.stdin.flush()

    def render(self, job: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
        """The answer. Raises TimeoutError, and EndedError; the process is of no use after them."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.end()

        timer = threading.Timer(wall_seconds, stop)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            with suppress(OSError):  # it is dead, which reading tells too
                self.process.stdin.write(json.dumps(job).encode() + b"\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise TimeoutError
        if not line.endswith(b"\n"):
            raise EndedError(self._obituary())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kill it, and whatever it has forked."""
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def close(self) -> None:
        """End it and give back what belongs to it."""
        self.end()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            with suppress(OSError):  # what was not sent any more
                if stream is not None:
                    stream.close()

    def _obituary(self) -> str:
        status = self.process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"the process that renders it ended with status {status} ({last})"


_idle: deque[Worker] = deque()
_keeping = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's


@atexit.register
def end_idle() -> None:
    """End the processes that wait for work."""
    while _idle:
        _idle.pop().close()


def prepare() -> None:
    """Have a process get ready while the caller does something else, unless one is."""
    if hasattr(os, "fork") and not _idle:  # without fork a process does one job
        with suppress(OSError):  # which will be told when there is something to render
            _idle.append(Worker())


def render(job: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
    """The worker's answer to a job, from an idle process or a new one.

    An idle process can have been killed since; then a new one does the job. Raises OSError when
    none can be started, TimeoutError, and EndedError when a new one ended too.
    """
    try:
        worker, fresh = _idle.pop(), False
    except IndexError:
        worker, fresh = Worker(), True
    kept = False
    try:
        answer = worker.render(job, wall_seconds)
        with _keeping:
            kept = len(_idle) < KEPT and hasattr(os, "fork")  # without fork it does one job
            if kept:
                _idle.append(worker)
        return answer
    except EndedError:
        if fresh:
            raise
    finally:
        if not kept:
            worker.close()
    return render(job, wall_seconds)
