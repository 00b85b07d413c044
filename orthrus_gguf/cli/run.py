"""orthrus-run: a prompt in, streamed text out; or a chat when there is no prompt."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from orthrus_gguf.cli import options
from orthrus_gguf.cli.chat import chat_loop
from orthrus_gguf.cli.drafts_view import has_colours, painted, summary
from orthrus_gguf.cli.finished import explain, result_json, statistics_block
from orthrus_gguf.cli.loaded import Loaded, load, say
from orthrus_gguf.command import Parser, base_parser, run_command
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text.chat import Message

DESCRIPTION = """\
Generate text with an Orthrus (or plain Qwen3) GGUF model.

  orthrus-run model.gguf -p "Why is the sky blue?"
  orthrus-run base.gguf --heads base-heads.gguf -f prompt.txt -n 200 --temp 0
  orthrus-run model.gguf                          (chat: Ctrl-C stops an answer, Ctrl-D leaves)

The text goes to stdout, everything else to stderr."""

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `orthrus-run` command; returns the exit code."""
    return run_command(_parser(), _run, argv)


def _parser() -> Parser:
    parser = base_parser("orthrus-run", DESCRIPTION)
    options.add_model_options(parser)
    add_prompt_options(parser)
    options.add_decoding_options(parser)
    options.add_sampling_options(parser)
    return parser


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """What to continue, how far, and how to show it."""
    group = parser.add_argument_group("prompt and output")
    group.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    group.add_argument("-f", "--file", metavar="FILE", help="read it from FILE (- is stdin)")
    group.add_argument("-sys", "--system-prompt", metavar="TEXT", help="system message")
    group.add_argument(
        "-c",
        "--ctx-size",
        type=options.natural,
        default=0,
        metavar="N",
        help="context in tokens (default: 0, what the model was trained for)",
    )
    group.add_argument(
        "-n",
        "--predict",
        type=int,
        default=-1,
        metavar="N",
        help="most tokens to generate (default: -1, until the text or the context ends)",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    group.add_argument("--raw", action="store_true", help="no chat template: continue the prompt")
    options.add_special_option(group)
    group.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="let the model think before it answers, where its template has that switch",
    )
    group.add_argument(
        "-e",
        "--escape",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=r"turn \n \t \r \" \' \\ in -p, -sys and --stop into what they stand for",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object, not the text")
    group.add_argument(
        "--explain", action="store_true", help="tell at the end what --strategy auto decided"
    )
    group.add_argument(
        "--show-drafts",
        action="store_true",
        help="colour the text by how it came about (drafted, corrected, plain), and sum it up",
    )
    group.add_argument("--no-perf", action="store_true", help="no statistics at the end")


def _run(args: argparse.Namespace) -> int:
    path = options.model_path(args)
    if args.escape:
        for name in ("prompt", "system_prompt"):
            if getattr(args, name) is not None:
                setattr(args, name, unescape(getattr(args, name)))
        args.stop = [unescape(text) for text in args.stop]
    if args.json and args.show_drafts:
        raise OrthrusError("--show-drafts: --json prints no text to colour; leave one of them out")
    prompt = _prompt(args)
    with ExitStack() as resources:
        loaded = load(path, args, resources)
        system = [] if args.system_prompt is None else [Message("system", args.system_prompt)]
        if prompt is None:
            return chat_loop(
                loaded, system, statistics=not args.no_perf, show_drafts=args.show_drafts
            )
        return _answer(loaded, [*system, Message("user", prompt)], args)


def _prompt(args: argparse.Namespace) -> str | None:
    """The prompt's text, or None for a chat."""
    if args.prompt is not None and args.file is not None:
        raise OrthrusError("give the prompt with -p or with -f, not with both")
    if args.file is not None:
        return _read_prompt(args.file)
    if args.prompt is None and (args.json or not sys.stdin.isatty()):
        raise OrthrusError("no prompt: give -p TEXT, -f FILE, or -f - to read it from stdin")
    return None if args.prompt is None else str(args.prompt)


def _read_prompt(name: str) -> str:
    """A prompt file's text; like llama.cpp, without the newline that editors add at the end."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OrthrusError(f"-f {name}: not UTF-8 text (at byte {error.start})") from error
    except OSError as error:
        raise OrthrusError(f"-f {name}: cannot be read: {error.strerror}") from error
    return text[:-1] if text.endswith("\n") else text


def unescape(text: str) -> str:
    r"""Replace `\n`, `\t` and the like; an unknown escape stays as it is."""
    parts = iter(text)
    out = []
    for char in parts:
        following = next(parts, "") if char == "\\" else None
        if following is None:
            out.append(char)
        else:
            out.append(ESCAPES.get(following, "\\" + following))
    return "".join(out)


def _answer(loaded: Loaded, messages: list[Message], args: argparse.Namespace) -> int:
    """One prompt, one answer."""
    request = loaded.request(loaded.render(messages))
    generation = loaded.start(request)
    if args.json:
        for _ in generation:
            pass
        answer = result_json(loaded.plan, request, generation.result)
        answer["timings"]["load_ms"] = loaded.seconds * 1e3
        answer["model"] = {
            "name": loaded.file.config.name,
            "files": [str(path) for path in loaded.file.paths],
            "runtime": loaded.model.description,
            "n_ctx": loaded.session.n_ctx,
        }
        print(json.dumps(answer, ensure_ascii=False))
        return 0
    try:
        write(painted(generation, sys.stdout) if args.show_drafts else generation)
    finally:
        print(flush=True)
        if not args.no_perf:
            say(f"\n{loaded.banner}")
            say(statistics_block(loaded.plan, request, generation.result, loaded.seconds))
        if args.show_drafts:
            say(summary(generation.result, colours=has_colours(sys.stdout, sys.stderr)))
        if args.explain:
            say(explain(loaded.plan, loaded.policy))
    return 0


def write(pieces: Iterable[str]) -> None:
    """Show text as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
