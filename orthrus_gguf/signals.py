"""How a command ends when it is asked to: SIGINT, SIGTERM and SIGHUP.

Imports nothing heavy: `entry` needs it before anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended
SIGNALLED = 128  # and, plus its number, for other signals

#: Those that end a program as Ctrl-C does. Windows has no SIGHUP.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """The process was asked to end. number: the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Within this context, those signals raise Terminated, once. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _SIGNALS:  # the clean-up must not be interrupted in turn
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    # A signal that is ignored, as under nohup, stays ignored.
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_on_interrupt(program: str) -> None:
    """From now on SIGINT ends the process at once, with one line.

    For the time in which nothing has to be cleaned up, and in which an exception would not do:
    what imports a module may swallow it, or tell of it as of a module that is broken.
    A SIGINT that is ignored, as in a script's background job, stays ignored.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):
            os.write(2, f"{program}: interrupted\n".encode())
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)


def raise_on_interrupt() -> None:
    """From now on SIGINT raises KeyboardInterrupt again, as Python has it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def mend_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever they are.

    A closed stdin is empty and a closed stderr swallows what it is told, both with their file
    descriptors taken: else the next file that is opened would get them, or notices would go to
    stdout. Characters that the encoding lacks are replaced, not an error.
    Raises OSError if stdout is closed: what a command is for cannot be seen then.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for number in closed:
        null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if null != number:
            os.dup2(null, number)
            os.close(null)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - lives on
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - lives on
    if 1 in closed:
        raise OSError("stdout is closed: there is nowhere to print to")
    for stream in (sys.stdin, sys.stdout):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
