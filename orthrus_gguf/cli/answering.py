"""Flags of the commands that answer, orthrus-run and orthrus-server: one block for both."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from orthrus_gguf.cli import options
from orthrus_gguf.cli.drafter import add_draft_ids_option, add_drafter_option
from orthrus_gguf.cli.llama_flags import foreign
from orthrus_gguf.cli.prefill import add_prefill_options
from orthrus_gguf.command import Parser


def add_answering_options(
    parser: Parser, add_own: Callable[[argparse.ArgumentParser], None]
) -> None:
    """The model, a drafter, how tokens are found and drawn; add_own: what the command has besides,
    which stands behind the model in the help."""
    options.add_model_options(parser)
    add_drafter_option(parser)
    add_draft_ids_option(parser)
    add_own(parser)
    options.add_decoding_options(parser)
    add_prefill_options(parser)
    options.add_sampling_options(parser)
    parser.foreign = foreign(parser)


def add_limit_options(group: argparse._ArgumentGroup, *, context: str, predict: str) -> None:
    """`-c` and `-n`. context, predict: what they are, as the help says it."""
    group.add_argument(
        "-c",
        "--ctx-size",
        type=options.natural,
        default=0,
        metavar="N",
        help=f"{context} (default: 0, what the model was trained for)",
    )
    group.add_argument(
        "-n",
        "--predict",
        "--n-predict",
        type=options.integer,
        default=-1,
        metavar="N",
        help=f"{predict} (default: -1, until the text or the context ends)",
    )


def add_thinking_options(group: argparse._ArgumentGroup, *, unless: str = "") -> None:
    """`--think`, and llama.cpp's `--reasoning`. unless: what goes before them."""
    group.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help=f"let the model think before it answers, where its template has that switch{unless}",
    )
    group.add_argument(
        "-rea",
        "--reasoning",
        dest="think",
        type=options.switch,
        metavar="on|off|auto",
        help="the same, as llama.cpp spells it",
    )
