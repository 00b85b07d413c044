"""The flags of `orthrus-convert`, and the request that they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import gguf

from orthrus_converters.encode import default_threads
from orthrus_converters.file_types import ALIASES, FILE_TYPES, TENSOR_TYPES, find_file_type
from orthrus_converters.plan import Request, check_outputs
from orthrus_converters.synthetic import find_shape, plan_synthetic
from orthrus_converters.type_plan import TypeChoice, parse_override
from orthrus_gguf.command import Parser, base_parser
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.writer import PlannedFile
from orthrus_gguf.model.shapes import HYBRID_SHAPES, SHAPES

PROGRAM = "orthrus-convert"
AUTO = "auto"
MAX_THREADS = 1024

#: What a synthetic model is made in unless asked otherwise.
SYNTHETIC_TYPE = "q4_k_m"

EXAMPLES = (
    f"{PROGRAM} MODEL OUT.gguf [--type TYPE] [--imatrix FILE] [--split]",
    f"{PROGRAM} --base BASE.gguf --heads CHECKPOINT_OR_GGUF OUT.gguf",
    f"{PROGRAM} DRAFTER OUT.gguf --target MODEL [--type TYPE]",
    f"{PROGRAM} --merge BASE.gguf OUT.gguf [--heads HEADS.gguf]",
    f"{PROGRAM} --synthetic NAME OUT.gguf [--type TYPE] [--seed N]",
)
DESCRIPTION = f"""\
Convert a model to GGUF: Qwen3, Qwen2 and Llama, with or without Orthrus heads; and DFlash drafters.

MODEL is a folder with safetensors, the id of a repository on the Hugging Face Hub, or a GGUF file.
By default the new file holds base model and diffusion heads in MODEL's own types, so that nothing
is lost. Names of the files written go to stdout, everything else to stderr.

types: {", ".join(FILE_TYPES)}
Those from iq3_xs down need an imatrix, all but q2_k.
"""


def build_parser() -> Parser:
    parser = base_parser(PROGRAM, EXAMPLES, DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder, repository id or GGUF")
    parser.add_argument("output", metavar="OUT.gguf", type=Path, help="file to write")
    _add_type_flags(parser)
    _add_packing_flags(parser)
    _add_synthetic_flags(parser)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--threads",
        "-t",
        metavar="N",
        type=_thread_count,
        default=default_threads(),
        help="threads that quantize (default: %(default)s, the cores here)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and exact sizes")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


def _add_type_flags(parser: Parser) -> None:
    group = parser.add_argument_group("types")
    group.add_argument(
        "--type",
        "--outtype",
        dest="type",
        metavar="TYPE",
        type=str.lower,
        choices=[*FILE_TYPES, *ALIASES, AUTO],
        default=AUTO,
        help="type of the matrices, with llama-quantize's exceptions; norms are always f32 "
        "(default: %(default)s, which keeps MODEL's)",
    )
    group.add_argument(
        "--imatrix", metavar="FILE", type=Path, help="importance of columns, from llama-imatrix"
    )
    for flag, what in (
        ("--heads-type", "the diffusion heads, which change acceptance but never the text"),
        ("--output-tensor-type", "the output matrix"),
        ("--token-embedding-type", "the token embedding"),
    ):
        group.add_argument(
            flag,
            metavar="TYPE",
            type=str.lower,
            choices=[*TENSOR_TYPES],
            help=f"type of {what}: {', '.join(TENSOR_TYPES)}"
            if flag == "--heads-type"
            else f"type of {what}",
        )
    group.add_argument(
        "--tensor-type",
        metavar="REGEX=TYPE",
        action="append",
        default=[],
        help="type of the matrices in whose name REGEX is found (repeatable, the first counts)",
    )
    group.add_argument("--pure", action="store_true", help="one type for all matrices")
    group.add_argument(
        "--allow-requantize",
        action="store_true",
        help="quantize what is quantized already, at a loss",
    )


def _add_packing_flags(parser: Parser) -> None:
    group = parser.add_argument_group("packing")
    group.add_argument(
        "--split",
        action="store_true",
        help="write a stock model, which llama.cpp runs too, and its heads separately: "
        "OUT.gguf and OUT-heads.gguf",
    )
    group.add_argument(
        "--merge",
        action="store_true",
        help="the inverse: MODEL and the heads beside it (or --heads) become one file",
    )
    group.add_argument(
        "--base",
        metavar="BASE.gguf",
        type=Path,
        help="add --heads to this model, all of whose tensors keep every byte",
    )
    group.add_argument(
        "--heads", metavar="HEADS", help="with --base: folder, repository id or GGUF with heads"
    )
    group.add_argument(
        "--target",
        metavar="TARGET",
        help="of a DFlash drafter: the model that it drafts for, whose tokens go into the file"
        " (folder, repository id or GGUF)",
    )


def _add_synthetic_flags(parser: Parser) -> None:
    group = parser.add_argument_group("synthetic models")
    group.add_argument(
        "--synthetic",
        metavar="NAME",
        help="make a model of random weights in the shape of a real one, with heads; only its "
        f"times mean anything (default --type: {SYNTHETIC_TYPE}): {', '.join(SHAPES)}; without "
        f"heads: {', '.join(HYBRID_SHAPES)}",
    )
    group.add_argument(
        "--seed", metavar="N", type=_natural, help="of the random weights (default: 0)"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, parsed. A bare word that is a type, as llama-quantize has it, is told its flag."""
    parser = build_parser()
    args: argparse.Namespace
    args, extra = parser.parse_known_intermixed_args(argv)
    words = [*extra, *filter(None, [args.model, str(args.output)])]
    bare = next((word for word in words if word.lower() in {*FILE_TYPES, *ALIASES}), None)
    if bare is not None and not Path(bare).exists():
        parser.error(f"{bare}: a type goes with its flag: --type {bare.lower()}")
    if extra:
        parser.error(f"what is {' '.join(extra)}? One MODEL and one OUT.gguf are expected")
    return args


def synthetic_file(args: argparse.Namespace) -> PlannedFile:
    """The synthetic model in parsed arguments. Raises OrthrusError for what it cannot have."""
    config = find_shape(args.synthetic)
    request = make_request(args)
    if request != Request(
        source=None,
        output=request.output,
        choice=TypeChoice(request.choice.file_type),
        overwrite=request.overwrite,
    ):
        raise OrthrusError(
            f"--synthetic {args.synthetic}: makes a whole model: only --type and --seed go with it"
        )
    type_name = SYNTHETIC_TYPE if args.type == AUTO else args.type
    check_outputs(request, [])
    return plan_synthetic(request.output, config, type_name, args.seed or 0)


def make_request(args: argparse.Namespace) -> Request:
    """The request in parsed arguments. Raises OrthrusError for a bad --tensor-type."""
    choice = TypeChoice(
        file_type=find_file_type(args.type),
        overrides=tuple(map(parse_override, args.tensor_type)),
        output=_tensor_type(args.output_tensor_type),
        embedding=_tensor_type(args.token_embedding_type),
        heads=_tensor_type(args.heads_type),
        pure=args.pure,
    )
    return Request(
        source=args.model,
        output=args.output,
        choice=choice,
        imatrix=args.imatrix,
        split=args.split,
        merge=args.merge,
        base=args.base,
        heads=args.heads,
        target=args.target,
        revision=args.revision,
        allow_requantize=args.allow_requantize,
        overwrite=args.overwrite,
    )


def _tensor_type(name: str | None) -> gguf.GGMLQuantizationType | None:
    return None if name is None else TENSOR_TYPES[name]


def _natural(value: str) -> int:
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {value!r}")
    return int(value)


def _thread_count(value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_THREADS}, found {value!r}")
    return int(value)
