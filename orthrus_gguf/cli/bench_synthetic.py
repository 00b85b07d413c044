"""`orthrus-bench --synthetic`: make a model of random weights to measure, where none is at hand.

The one place of the runtime package that uses the converters, and only when asked to make a file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tqdm import tqdm

from orthrus_gguf.cli import options
from orthrus_gguf.cli.loaded import say
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.writer import check_target
from orthrus_gguf.model.shapes import QWEN3_SHAPES

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
        help=f"make a model of random weights in this shape: {', '.join(QWEN3_SHAPES)}",
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
    """Write the model that the flags ask for; returns its path.

    Raises OrthrusError for unknown names, and if the file exists or cannot be written.
    """
    if args.synthetic not in QWEN3_SHAPES:
        known = ", ".join(QWEN3_SHAPES)
        raise OrthrusError(f"--synthetic {args.synthetic}: expected one of {known}")
    if args.heads is not None:
        raise OrthrusError("--heads: a synthetic model has heads already; leave it out")
    type_name = args.type or DEFAULT_TYPE
    path = _path(args, type_name)
    if path.is_file():
        raise OrthrusError(
            f"{path}: exists already; measure it with orthrus-bench {path}, or name another file"
        )
    check_target(path, overwrite=False)
    # Imported here: the runtime needs no converters, and this command only for this flag.
    from orthrus_converters.synthetic import make_synthetic

    started = time.perf_counter()
    with tqdm(desc=path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        size = make_synthetic(
            path, QWEN3_SHAPES[args.synthetic], type_name, seed=args.seed or 0, progress=bar.update
        )
    seconds = time.perf_counter() - started
    say(f"{path}: wrote {size / 1e9:.2f} GB in {seconds:.1f} s ({LABEL})")
    return path


def _path(args: argparse.Namespace, type_name: str) -> Path:
    """Where to write: the file named as the model, else one named after the shape."""
    if args.model is None and args.model_flag is None:
        return Path(f"synthetic-{args.synthetic}-{type_name.lower()}.gguf")
    return Path(options.model_path(args))
