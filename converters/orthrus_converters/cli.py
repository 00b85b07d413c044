"""The command `orthrus-convert`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from orthrus_converters.dispatch import plan_conversion
from orthrus_converters.encode import Encoder
from orthrus_converters.options import PROGRAM, make_request, parse, synthetic_file
from orthrus_converters.summary import listing, summary
from orthrus_converters.synthetic import LABEL
from orthrus_gguf.command import REPORTED, report
from orthrus_gguf.entry import INTERRUPTED
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.writer import file_size, write_files
from orthrus_gguf.signals import SIGNALLED, Terminated, ending_cleanly


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0, 1 after an error (one line on stderr), 130 after Ctrl-C, 143 after SIGTERM.
    """
    args = parse(argv)
    try:
        with ending_cleanly():
            return _convert(args) if args.synthetic is None else _synthesize(args)
    except Terminated as signal:
        print(f"{PROGRAM}: terminated, nothing was written", file=sys.stderr)
        return SIGNALLED + signal.number
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    except REPORTED as error:
        return report(PROGRAM, error, verbose=args.verbose)


def _convert(args: argparse.Namespace) -> int:
    with Encoder(args.threads) as encoder:
        if args.seed is not None:
            raise OrthrusError("--seed goes with --synthetic NAME, which makes the model")
        plan = plan_conversion(make_request(args))
        files = [file.with_data(encoder) for file in plan.files]
        if args.dry_run:
            print(listing(plan, [file_size(file) for file in files]))
            return 0
        n_bytes = sum(job.n_bytes for job in plan.jobs)
        with _progress_bar(plan.files[0].path, n_bytes) as bar:
            sizes = write_files(files, bar.update, overwrite=args.overwrite, verify=plan.verify)
    print(summary(plan, sizes), file=sys.stderr)
    for file in plan.files:
        print(file.path)
    return 0


def _synthesize(args: argparse.Namespace) -> int:
    file = synthetic_file(args)
    if args.dry_run:
        print(f"{file.path}: {len(file.tensors)} tensors, {file_size(file):,} bytes")
        return 0
    started = time.perf_counter()
    n_bytes = sum(tensor.n_bytes for tensor in file.tensors)
    with _progress_bar(file.path, n_bytes) as bar:
        [size] = write_files([file], bar.update, overwrite=args.overwrite)
    seconds = time.perf_counter() - started
    print(f"{file.path}: wrote {size / 1e9:.2f} GB in {seconds:.1f} s ({LABEL})", file=sys.stderr)
    print(file.path)
    return 0


def _progress_bar(path: Path, n_bytes: int) -> tqdm[NoReturn]:
    """A bar over the bytes to write, which shows only on a terminal."""
    return tqdm(total=n_bytes, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None)
