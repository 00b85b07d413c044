"""The command `orthrus-train`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from orthrus_gguf.cli.options import integer, number, positive
from orthrus_gguf.command import Parser, base_parser, run_command
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.signals import ending_cleanly

PROGRAM = "orthrus-train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 after an error (one line on stderr), 130 after Ctrl-C."""
    return run_command(_parser(), _train, argv)


def _parser() -> Parser:
    parser = base_parser(
        PROGRAM,
        ["orthrus-train BASE OUT", "orthrus-train BASE OUT --prompts FILE_OR_FOLDER"],
        "Train diffusion heads for a base (GGUF, or Hugging Face folder or repository) on its own "
        "answers.\nThe same command goes on where it was left.",
    )
    parser.add_argument("base", metavar="BASE", help="the model; a GGUF's rounding is kept")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for all that is made")
    add = parser.add_argument
    add("--prompts", type=Path, help="text, JSONL of chats, or a folder (default: by the base)")
    add("--heads", type=Path, help="heads to begin with (default: copies of the attention)")
    add(
        "--texts",
        type=positive,
        default=2000,
        help="texts to write; 1 of 16 is held out (%(default)s)",
    )
    add("--answer-tokens", type=positive, default=256, help="most of an answer (%(default)s)")
    add("--prompt-tokens", type=positive, default=48, help="of a prompt made of text (%(default)s)")
    add("--context", type=positive, default=384, help="most tokens of a text (%(default)s)")
    add("--steps", type=positive, default=1350, help="training steps (%(default)s)")
    add("--rate", type=_rate, default=5e-4, help="highest learning rate (%(default)s)")
    add("--batch", type=positive, default=12, help="texts of a step (%(default)s)")
    add("--blocks", type=positive, default=8, help="blocks on each (%(default)s)")
    add("--block-size", type=_block, default=8, help="rows of a block (%(default)s)")
    add(
        "--decay",
        type=_share,
        default=0.85,
        help="weight of a draft by the one before (%(default)s)",
    )
    add(
        "--for-auto",
        action="store_true",
        help="blocks where auto asks for them: behind accepted drafts, where lookups have nothing;"
        " rows weighed by the drafts that they bring, not by --decay",
    )
    add("--mask-token", type=integer, help="id of the mask token (default: the tokenizer's)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: a GPU if there is one",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of products (auto: bfloat16 where it is faster)",
    )
    add("--threads", "-t", type=positive, help="CPU threads (default: all)")
    add("--seed", type=integer, default=0, help="of all that is drawn (%(default)s)")
    add("--minutes", type=_rate, default=5.0, help="between checkpoints (%(default)s)")
    add("--keep", type=_rate, default=2.0, help="GB for what is read once (%(default)s)")
    add("--finish", action="store_true", help="heads as the last checkpoint has them, and end")
    add("--dry-run", action="store_true", help="say what it takes, and end")
    return parser


def _block(text: str) -> int:
    value = integer(text)
    if not 2 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"{value}: expected 2 to 1024")
    return value


def _rate(text: str) -> float:
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def _share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, up to 1")
    return value


def _train(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("torch") is None:
        raise OrthrusError("training needs torch: pip install 'orthrus-gguf[train]'")
    from orthrus_gguf.cli.train_report import gains, tell
    from orthrus_gguf.training.answers import Wanted
    from orthrus_gguf.training.run import Settings, train

    if args.context < args.prompt_tokens + 16:
        raise OrthrusError(
            f"--context {args.context}: expected at least --prompt-tokens + 16 = "
            f"{args.prompt_tokens + 16}"
        )
    wanted = Wanted(args.texts, args.answer_tokens, args.context, args.prompt_tokens, args.seed)
    settings = Settings(
        base=args.base,
        folder=args.out,
        prompts=args.prompts,
        heads=args.heads,
        mask=args.mask_token,
        wanted=wanted,
        steps=args.steps,
        rate=args.rate,
        texts=args.batch,
        blocks=args.blocks,
        rows=args.block_size,
        decay=args.decay,
        for_auto=args.for_auto,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        minutes=args.minutes,
        keep_bytes=int(args.keep * 1e9),
        dry_run=args.dry_run,
        finish=args.finish,
    )

    def say(line: str) -> None:
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)

    with ending_cleanly():
        report = train(settings, say, gains)
    if report is not None:
        tell(report, args.out, say)
    return 0


if __name__ == "__main__":
    from orthrus_gguf.entry import start

    start("train")
