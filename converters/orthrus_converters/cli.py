"""The command `orthrus-convert`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from orthrus_converters.convert import Plan, Request, plan_conversion
from orthrus_converters.file_types import FILE_TYPES
from orthrus_converters.summary import summary
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.writer import write_files

PROGRAM = "orthrus-convert"
INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended
AUTO = "auto"

DESCRIPTION = """\
Convert an Orthrus checkpoint (a Hugging Face folder with safetensors) to GGUF.

By default the file holds base model and diffusion heads, in the checkpoint's own type, so that
nothing is lost. Names of the files written go to stdout, everything else to stderr.
"""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line and exit code 1, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder with config.json")
    parser.add_argument("output", metavar="OUT.gguf", type=Path, help="file to write")
    parser.add_argument(
        "--type",
        "--outtype",
        dest="type",
        type=str.lower,
        choices=[*FILE_TYPES, AUTO],
        default=AUTO,
        help="type of the matrices; norms are always f32 (default: %(default)s, which keeps the "
        "checkpoint's)",
    )
    parser.add_argument(
        "--split",
        action="store_true",
        help="write a stock qwen3 model, which llama.cpp runs too, and its heads separately: "
        "OUT.gguf and OUT-heads.gguf",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    parser.add_argument(
        "--version", action="version", version=f"orthrus-gguf {version('orthrus-gguf')}"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 after an error (one line on stderr), 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        plan = plan_conversion(
            Request(
                source=args.model,
                output=args.output,
                file_type=FILE_TYPES.get(args.type),
                split=args.split,
                overwrite=args.overwrite,
            )
        )
        sizes = _write(plan, overwrite=args.overwrite)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    except (OrthrusError, OSError, MemoryError) as error:
        if args.verbose:
            traceback.print_exc()
        text = " ".join(str(error).split()) or "out of memory"
        print(f"{PROGRAM}: error: {text}", file=sys.stderr)
        return 1
    print(summary(plan, sizes), file=sys.stderr)
    for file in plan.files:
        print(file.path)
    return 0


def _write(plan: Plan, *, overwrite: bool) -> list[int]:
    """Write the plan under a progress bar, which shows only on a terminal."""
    with tqdm(
        total=plan.n_bytes,
        desc=plan.files[0].path.name,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,
    ) as bar:
        return write_files(plan.files, bar.update, overwrite=overwrite)
