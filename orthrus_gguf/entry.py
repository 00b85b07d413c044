"""Where every command starts: nothing heavy is imported before Ctrl-C and the streams are safe."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NoReturn

from orthrus_gguf.signals import (
    INTERRUPTED,
    leave_on_interrupt,
    mend_streams,
    raise_on_interrupt,
)

#: Command → module with its `main`. By name, since importing them is what takes time.
COMMANDS = {
    "run": "orthrus_gguf.cli.run",
    "convert": "orthrus_converters.cli",
    "inspect": "orthrus_gguf.cli.inspect",
    "bench": "orthrus_gguf.cli.bench",
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


def start(command: str) -> NoReturn:
    """Run a command of `COMMANDS` with the arguments of this process, and end the process."""
    program = f"orthrus-{command}"
    leave_on_interrupt(program)
    try:
        mend_streams()
    except OSError as error:
        _end(program, f"error: {error}", 1)
    if not os.environ.get("XDG_CACHE_HOME", "unset"):
        del os.environ["XDG_CACHE_HOME"]  # empty means unset, which not every library knows
    main = import_module(COMMANDS[command]).main
    code = 1
    try:
        raise_on_interrupt()
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except OSError as error:  # while its flags were read: what was printed could not be
        code = _broken(program, error)
    except KeyboardInterrupt:  # before or after the command's own handling of it
        leave_on_interrupt(program)
        _end(program, "interrupted", INTERRUPTED)
    finally:
        leave_on_interrupt(program)  # Python's own shutdown is no place for an exception either
    try:
        sys.stdout.flush()  # now, where failing is a line rather than a traceback
    except OSError as error:
        code = _broken(program, error)
    sys.exit(code)


def _broken(program: str, error: OSError) -> int:
    """Nothing more can be printed to stdout: say so, unless its reader left; the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not isinstance(error, BrokenPipeError):
        print(f"{program}: error: stdout: {error.strerror}", file=sys.stderr, flush=True)
    return 1


def _end(program: str, line: str, code: int) -> NoReturn:
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
