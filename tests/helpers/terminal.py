"""A command in a pseudo-terminal: what a user types, and what comes on the screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType


class Terminal:
    """A process with a terminal of 100 columns as stdin, stdout and stderr. Use in a `with`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "TERM": "xterm", **(env or {})},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def poll(self, text: str, seconds: float) -> str | None:
        """What came before `text` since the last call; None if it does not come in time."""
        end = time.monotonic() + seconds
        while text not in self._unread:
            if time.monotonic() > end:
                return None
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self._unread += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # the process has ended
                    return None
        seen, _, self._unread = self._unread.partition(text)
        return seen

    def read_until(self, text: str) -> str:
        """What came before `text` since the last call."""
        seen = self.poll(text, 30)
        assert seen is not None, f"no {text!r} in {self._unread!r}"
        return seen

    def ask(self, line: str, until: str = "\r\n> ") -> str:
        """Type a line; what comes until the next prompt, without what was typed."""
        self.type(line + "\n")
        return self.read_until(until)

    def interrupt_until(self, text: str) -> str:
        """Press Ctrl-C until `text` comes: readline misses one that comes just before it waits."""
        for _ in range(10):
            self.process.send_signal(signal.SIGINT)
            seen = self.poll(text, 2)
            if seen is not None:
                return seen
        raise AssertionError(f"Ctrl-C gives no {text!r} in {self._unread!r}")
