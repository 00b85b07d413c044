"""The command `orthrus-convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from tqdm import tqdm

from orthrus_converters.dispatch import plan_conversion
from orthrus_converters.encode import Encoder
from orthrus_converters.options import PROGRAM, build_parser, make_request
from orthrus_converters.plan import Plan
from orthrus_converters.signals import Terminated, ending_cleanly
from orthrus_converters.summary import listing, summary
from orthrus_gguf.command import INTERRUPTED, REPORTED, report
from orthrus_gguf.gguf.writer import file_size, write_files

SIGNALLED = 128  # a shell reports this plus the number of the signal that ended a program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0, 1 after an error (one line on stderr), 130 after Ctrl-C, 143 after SIGTERM.
    """
    args = build_parser().parse_intermixed_args(argv)
    try:
        with ending_cleanly(), Encoder(args.threads) as encoder:
            plan = plan_conversion(make_request(args))
            files = [file.with_data(encoder) for file in plan.files]
            if args.dry_run:
                print(listing(plan, [file_size(file) for file in files]))
                return 0
            with _progress_bar(plan) as bar:
                sizes = write_files(files, bar.update, overwrite=args.overwrite, verify=plan.verify)
    except Terminated as signal:
        print(f"{PROGRAM}: terminated, nothing was written", file=sys.stderr)
        return SIGNALLED + signal.number
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    except REPORTED as error:
        return report(PROGRAM, error, verbose=args.verbose)
    print(summary(plan, sizes), file=sys.stderr)
    for file in plan.files:
        print(file.path)
    return 0


def _progress_bar(plan: Plan) -> tqdm[NoReturn]:
    """A bar over the bytes to write, which shows only on a terminal."""
    return tqdm(
        total=sum(job.n_bytes for job in plan.jobs),
        desc=plan.files[0].path.name,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,
    )
