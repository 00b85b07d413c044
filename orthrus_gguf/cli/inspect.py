"""orthrus-inspect: what is in a GGUF file, what memory it needs, whether it is whole."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes time to import
    from orthrus_gguf.entry import start

    start("inspect")

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from orthrus_gguf.cli import options
from orthrus_gguf.cli.drafter import add_drafter_option
from orthrus_gguf.command import Parser, base_parser, print_json, run_command
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.parts import open_gguf
from orthrus_gguf.inspection import text
from orthrus_gguf.inspection.diff import Comparison, diff_metadata, diff_tensors
from orthrus_gguf.inspection.gpu import gpu_fit
from orthrus_gguf.inspection.report import Report, inspect, report_json
from orthrus_gguf.inspection.verify import TensorCheck, overall, verify

EXAMPLES = ("orthrus-inspect model.gguf", "orthrus-inspect --verify model.gguf")
DESCRIPTION = """\
Show what is in a GGUF file: metadata, tensors by type and layer, bits per weight, and the memory
that the model needs. Files of other architectures, heads and imatrix files work too, as far as they
are alike.

  orthrus-inspect model.gguf -c 16384 -ctk q8_0 -ctv q8_0
  orthrus-inspect base.gguf --heads base-heads.gguf
  orthrus-inspect model.gguf --gpu -c 131072
  orthrus-inspect --verify model.gguf      (reads every byte; exit code 1 for damage)
  orthrus-inspect --diff one.gguf two.gguf (exit code 1 for differences)"""

FALLBACK_WIDTH = 100  # where stdout is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `orthrus-inspect` command; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names come from strangers
    return run_command(_parser(), _run, argv)


def _parser() -> Parser:
    parser = base_parser("orthrus-inspect", EXAMPLES, DESCRIPTION)
    parser.add_argument("file", nargs="?", metavar="FILE.gguf", help="the file")
    parser.add_argument("--heads", metavar="HEADS.gguf", help="diffusion heads of a split model")
    add_drafter_option(parser)
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=options.positive,
        metavar="N",
        help="show the memory for a context of N tokens too",
    )
    for key, name in (("k", "keys"), ("v", "values")):
        parser.add_argument(
            f"-ct{key}",
            f"--cache-type-{key}",
            default="f16",
            metavar="TYPE",
            help=f"cache type of {name}: f32, f16, q8_0, q4_0 (default: f16)",
        )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="show which cache types fit at which context on cards of 8 to 24 GB (needs PyTorch and"
        " Triton, no GPU; -c N: also what N tokens need)",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--verify",
        action="store_true",
        help="check every qblock for NaN or infinite scales, print digests",
    )
    what.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="compare metadata and tensors of two files"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.diff is not None:
        if args.file is not None or args.heads is not None or args.drafter is not None:
            raise OrthrusError("--diff compares the two files after it; name no others")
        return _diff(*args.diff, as_json=args.json)
    if args.file is None:
        raise OrthrusError("name a file: orthrus-inspect FILE.gguf")
    report = inspect(
        args.file,
        args.heads,
        context=args.ctx_size,
        cache_types=(args.cache_type_k, args.cache_type_v),
        drafter=args.drafter,
    )
    if args.gpu:
        return _gpu(report, args.ctx_size, as_json=args.json)
    if args.verify:
        return _verify(report, as_json=args.json)
    if args.json:
        print_json(report_json(report))
    else:
        print(text.report_text(report, _width(), all_tensors=args.tensors), end="")
    return 0


def _gpu(report: Report, context: int | None, *, as_json: bool) -> int:
    found = gpu_fit(report, context)
    if as_json:
        caches = [vars(fit) for fit in found.fits]
        drafter = {} if found.drafter is None else {"drafter": found.drafter}
        print_json({"cards_gib": list(found.cards), **drafter, "caches": caches})
    else:
        print(text.gpu_text(found), end="")
    return 0


def _width() -> int:
    return shutil.get_terminal_size((FALLBACK_WIDTH, 24)).columns


def _verify(report: Report, *, as_json: bool) -> int:
    n_bytes = report.summary.total.n_bytes
    with tqdm(total=n_bytes, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        checks = list(verify(report.tensors, bar.update))
    digests = dict(overall(checks))
    damaged = [check for check in checks if check.damage is not None]
    if as_json:
        print_json({"tensors": [_check_json(check) for check in checks], **digests})
    else:
        print(text.verify_text(checks, digests, n_bytes), end="")
    for check in damaged:
        name = text.visible(check.info.name)
        print(f"orthrus-inspect: error: tensor {name}: {check.damage}", file=sys.stderr)
    return 1 if damaged else 0


def _check_json(check: TensorCheck) -> dict[str, Any]:
    return {
        "name": check.info.name,
        "type": check.info.type.name,
        "sha256": check.sha256,
        "bad": check.bad,
        "first_bad": check.first_bad,
    }


def _diff(first: str, second: str, *, as_json: bool) -> int:
    with open_gguf(first) as one, open_gguf(second) as two:
        metadata, tensors = diff_metadata(one, two), diff_tensors(one, two)
    equal = metadata.equal and tensors.equal
    if as_json:
        parts = {"metadata": _comparison_json(metadata), "tensors": _comparison_json(tensors)}
        print_json({"equal": equal, **parts})
    else:
        print(text.diff_text(metadata, tensors, _width()), end="")
    return 0 if equal else 1


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "same": list(comparison.same),
        "different": dict(comparison.different),
        "only_first": list(comparison.only_first),
        "only_second": list(comparison.only_second),
    }
