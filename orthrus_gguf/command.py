"""What every command shares: how it starts, how it fails, how it ends."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from orthrus_gguf import __version__
from orthrus_gguf.errors import OrthrusError

INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended

#: What can go wrong without a bug. Anything else is one, and shows its traceback.
REPORTED = (OrthrusError, MemoryError, OSError)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line and exit code 1, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def base_parser(prog: str, description: str) -> Parser:
    """A parser with the flags that every command has."""
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"orthrus-gguf {__version__}")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    return parser


def run_command(
    parser: Parser,
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Parse and run. Errors become one line on stderr and exit code 1; Ctrl-C becomes 130."""
    args = parser.parse_args(argv)
    try:
        return command(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`| head`): nobody is there to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except REPORTED as error:
        return report(parser.prog, error, verbose=args.verbose)


def report(program: str, error: Exception, *, verbose: bool) -> int:
    """Print an error as one line, after its traceback if asked for; returns the exit code."""
    if verbose:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or "out of memory"
    print(f"{program}: error: {text}", file=sys.stderr)
    return 1
