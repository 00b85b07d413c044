"""`orthrus-bench predict`: what passes should cost on cards that are not at hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence

from orthrus_gguf.bench.prediction.cards import (
    CARDS,
    DEFAULT_SHARES,
    TOO_OLD,
    Card,
    Shares,
    described,
)
from orthrus_gguf.bench.prediction.passes import Activations
from orthrus_gguf.bench.prediction.shapes import FILE_TYPES
from orthrus_gguf.bench.prediction.table import MODELS, Selection, as_json, markdown
from orthrus_gguf.cli import options
from orthrus_gguf.command import Parser, base_parser, print_json, run_command
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.model.shapes import BLOCK_SIZE

EXAMPLES = (
    "orthrus-bench predict",
    "orthrus-bench predict --card bandwidth=504,tops=233,sms=46,name=mine",
    "orthrus-bench predict --cards rtx-3090 --models qwen3-8b --types q4_k_m",
    "orthrus-bench predict --cards rtx-3090 --models qwen3.6-27b-mtp --types q4_k_m --depth 5",
)
DESCRIPTION = """\
Predict the time of passes and steps from what they read, multiply and launch. Arithmetic, nothing
is measured: the assumptions are printed beneath."""

DEFAULT_MODELS = ("qwen3-1.7b", "qwen3-4b", "qwen3-8b")
CONTEXTS = (512, 4096, 32_768)
DEFAULT_CARDS = ("rtx-3090", "rtx-4090", "h200")


def main(argv: Sequence[str]) -> int:
    """Entry point of the subcommand, with the words after its name; returns the exit code."""
    return run_command(_parser(), _run, argv)


def _parser() -> Parser:
    parser = base_parser("orthrus-bench predict", EXAMPLES, DESCRIPTION)

    def add(flag: str, known: Collection[str], default: Sequence[str]) -> None:
        parser.add_argument(
            flag,
            type=_names(known),
            default=tuple(default),
            metavar="NAME,…",
            help=f"of {', '.join(known)} (default: {', '.join(default)})",
        )

    add("--models", MODELS, DEFAULT_MODELS)
    parser.add_argument(
        "--cards",
        type=_names(CARDS),
        metavar="NAME,…",
        help=f"of {', '.join(CARDS)} (default: {', '.join(DEFAULT_CARDS)}); {TOO_OLD}",
    )
    parser.add_argument(
        "--card",
        type=_card,
        action="append",
        metavar="bandwidth=GB/s,tops=INT8,sms=N",
        help="any other card: its bandwidth, dense int8 operations and multiprocessors; also "
        "sm=CAPABILITY (default: 89), l2=MB, name=TEXT; repeatable",
    )
    add("--types", FILE_TYPES, [*FILE_TYPES])
    parser.add_argument(
        "--contexts",
        type=options.listed(options.natural, "512,4096"),
        default=CONTEXTS,
        metavar="N,…",
        help=f"tokens in the cache (default: {','.join(map(str, CONTEXTS))})",
    )
    parser.add_argument(
        "--block",
        type=options.positive,
        default=BLOCK_SIZE,
        metavar="N",
        help=f"rows of a draft and of its verification (default: {BLOCK_SIZE})",
    )
    parser.add_argument(
        "--depth",
        type=options.positive,
        choices=range(1, MtpFile.beside.most + 1),
        default=MtpFile.beside.width,
        metavar="N",
        help="tokens of an MTP block's draft, at most"
        f" {MtpFile.beside.most} (default: {MtpFile.beside.width})",
    )
    parser.add_argument(
        "--activations",
        choices=[kind.value for kind in Activations],
        default=Activations.AUTO.value,
        help="auto: int8 on GeForce cards, fp16 elsewhere (default: auto)",
    )
    for name, share in vars(DEFAULT_SHARES).items():
        parser.add_argument(
            f"--{name}-share",
            type=_share,
            default=share,
            metavar="X",
            help=f"share of the card's {name} rates that kernels reach (default: {share})",
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _run(args: argparse.Namespace) -> int:
    selection = Selection(
        models=args.models,
        cards=_cards(args),
        types=args.types,
        contexts=args.contexts,
        block=args.block,
        depth=args.depth,
        activations=Activations(args.activations),
        shares=Shares(args.memory_share, args.compute_share),
    )
    if args.json:
        print_json(as_json(selection))
    else:
        print(markdown(selection), end="")
    return 0


def _cards(args: argparse.Namespace) -> tuple[Card, ...]:
    """Those named and those described; the usual ones where neither is given."""
    own = tuple(args.card or ())
    names = args.cards or (() if own else DEFAULT_CARDS)
    return (*(CARDS[name] for name in names), *own)


def _card(text: str) -> Card:
    try:
        return described(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """argparse type: names out of `known`, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(part.strip().lower() for part in text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: expected one of {', '.join(known)}")
        return names

    return parse


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, up to 1")
    return value
