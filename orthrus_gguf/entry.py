"""Where every command starts: Ctrl-C and the streams are made safe before anything is imported.

What this module imports itself is next to nothing for that reason.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended

try:
    import signal
except KeyboardInterrupt:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)

#: Command → module with its `main`. By name, since importing them is what takes time.
COMMANDS = {
    "run": "orthrus_gguf.cli.run",
    "convert": "orthrus_converters.cli",
    "inspect": "orthrus_gguf.cli.inspect",
    "bench": "orthrus_gguf.cli.bench",
    "server": "orthrus_gguf.cli.server",
    "train": "orthrus_gguf.cli.train",
}


def run() -> NoReturn:
    """`orthrus-run`."""
    start("run")


def convert() -> NoReturn:
    """`orthrus-convert`."""
    start("convert")


def inspect() -> NoReturn:
    """`orthrus-inspect`."""
    start("inspect")


def bench() -> NoReturn:
    """`orthrus-bench`."""
    start("bench")


def server() -> NoReturn:
    """`orthrus-server`."""
    start("server")


def train() -> NoReturn:
    """`orthrus-train`."""
    start("train")


def start(command: str) -> NoReturn:
    """Run a command of `COMMANDS` with the arguments of this process, and end the process."""
    program = f"orthrus-{command}"
    _leave_on_interrupt(program)
    try:
        _mend_streams()
    except OSError as error:
        _say(program, f"error: {error}")
        sys.exit(1)
    if os.environ.get("XDG_CACHE_HOME") == "":
        del os.environ["XDG_CACHE_HOME"]  # empty means unset, which not every library knows
    from importlib import import_module

    main = import_module(COMMANDS[command]).main
    code = 1
    try:
        _raise_on_interrupt()
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except OSError as error:  # while its flags were read: what was printed could not be
        code = _broken(program, error)
    except KeyboardInterrupt:  # before or after the command's own handling of it
        _leave_on_interrupt(program)
        _say(program, "interrupted")
        code = INTERRUPTED
    finally:
        _leave_on_interrupt(program)  # Python's own end is no place for an exception either
    try:
        sys.stdout.flush()  # now, where failing is a line rather than a traceback
    except OSError as error:
        code = _broken(program, error)
    sys.exit(code)


def _leave_on_interrupt(program: str) -> None:
    """From now on SIGINT ends the process at once, with one line.

    For the time in which nothing has to be cleaned up, and in which an exception would not do:
    what imports a module may swallow it, or tell of it as of a module that is broken.
    A SIGINT that is ignored, as in a script's background job, stays ignored.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        try:
            os.write(2, f"{program}: interrupted\n".encode())
        finally:
            os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)


def _raise_on_interrupt() -> None:
    """From now on SIGINT raises KeyboardInterrupt again, as Python has it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _mend_streams() -> None:
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


def _broken(program: str, error: OSError) -> int:
    """Nothing more can be printed to stdout: say so, unless its reader left; the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not isinstance(error, BrokenPipeError):
        _say(program, f"error: stdout: {error.strerror}")
    return 1


def _say(program: str, line: str) -> None:
    print(f"{program}: {line}", file=sys.stderr, flush=True)
