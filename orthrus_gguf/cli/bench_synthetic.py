"""`orthrus-bench --synthetic`: a model of random weights to measure, where none is at hand.

Short for `orthrus-convert --synthetic`, which makes it: in a process of its own, since nothing of
the runtime package needs the converters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from orthrus_gguf.cli import options
from orthrus_gguf.entry import INTERRUPTED
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.shapes import SHAPES
from orthrus_gguf.signals import SIGNALLED, Terminated, ending_cleanly

DEFAULT_TYPE = "Q4_K_M"

#: Follows the name of a synthetic model wherever figures are shown.
LABEL = "synthetic: random weights, so only times mean anything"

_FLAGS = {"type": "--type", "seed": "--seed", "make_only": "--make-only"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of a synthetic model."""
    group = parser.add_argument_group("synthetic model (FILE.gguf is then written, not read)")
    group.add_argument(
        "--synthetic",
        metavar="NAME",
        help=f"make a model of random weights in this shape: {', '.join(SHAPES)}",
    )
    group.add_argument(
        "--type", metavar="TYPE", help=f"its type, as of orthrus-convert (default: {DEFAULT_TYPE})"
    )
    group.add_argument(
        "--seed", type=options.natural, metavar="N", help="of the random weights (default: 0)"
    )
    group.add_argument(
        "--make-only", action="store_true", default=None, help="write it, measure nothing"
    )


def check_unused(args: argparse.Namespace) -> None:
    """Raise OrthrusError for flags that only go with `--synthetic`."""
    for field, flag in _FLAGS.items():
        if getattr(args, field) is not None:
            raise OrthrusError(f"{flag} goes with --synthetic NAME, which makes the model")


def make(args: argparse.Namespace) -> Path:
    """Have the converter write the model that the flags ask for; returns its path.

    Raises OrthrusError for names that mean nothing here, and SystemExit with the converter's exit
    code if it fails, after it has said why.
    """
    if args.synthetic not in SHAPES:
        raise OrthrusError(f"--synthetic {args.synthetic}: expected one of {', '.join(SHAPES)}")
    if args.heads is not None:
        raise OrthrusError("--heads: a synthetic model has heads already; leave it out")
    type_name = args.type or DEFAULT_TYPE
    path = _path(args, type_name)
    if path.is_file():
        raise OrthrusError(
            f"{path}: exists already; measure it with orthrus-bench {path}, or name another file"
        )
    command = [sys.executable, "-m", "orthrus_converters", "--synthetic", args.synthetic]
    flags = ["--type", type_name.lower(), "--seed", str(args.seed or 0)]
    code = _ended([*command, *flags, "--", str(path)])
    if code:
        raise SystemExit(code)
    return path


def _ended(command: list[str]) -> int:
    """Run a command to its end; returns its exit code. It ends, and cleans up, if this process is
    told to end."""
    with ending_cleanly(), subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as signal:
            process.terminate()  # a Ctrl-C may have reached it already, which is all the same
            process.wait()
            return SIGNALLED + signal.number if isinstance(signal, Terminated) else INTERRUPTED


def _path(args: argparse.Namespace, type_name: str) -> Path:
    """Where to write: the file named as the model, else one named after the shape."""
    if args.model is None and args.model_flag is None:
        return Path(f"synthetic-{args.synthetic}-{type_name.lower()}.gguf")
    return Path(options.model_path(args))
