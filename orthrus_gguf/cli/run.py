"""orthrus-run: a prompt in, streamed text out; or a chat when there is no prompt."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes time to import
    from orthrus_gguf.entry import start

    start("run")

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from orthrus_gguf.cli import options
from orthrus_gguf.cli.answering import (
    add_answering_options,
    add_limit_options,
    add_thinking_options,
)
from orthrus_gguf.cli.drafts_view import has_colours, painted, summary
from orthrus_gguf.cli.finished import explain, explanation_json, result_json, statistics_block
from orthrus_gguf.cli.llama_flags import HelpLlama
from orthrus_gguf.cli.loaded import Loaded, load, say
from orthrus_gguf.cli.piped import piped_text
from orthrus_gguf.cli.twice import answer_twice
from orthrus_gguf.command import Parser, base_parser, print_json, run_command
from orthrus_gguf.engine import Generation
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.request import Request
from orthrus_gguf.text.chat import Message

EXAMPLES = (
    'orthrus-run model.gguf -p "Why is the sky blue?"',
    "orthrus-run model.gguf          (chat: Ctrl-C stops an answer, Ctrl-D leaves)",
)
DESCRIPTION = """\
Generate text with a GGUF model: Qwen3, Qwen2 or Llama, faster with Orthrus heads. The text goes to
stdout, everything else to stderr. Flags are llama.cpp's: --help-llama tells what each does here.

  orthrus-run base.gguf --heads heads.gguf -f prompt.txt -n 200 --temp 0
  orthrus-run qwen3-8b.gguf --drafter dflash.gguf (a stock model, with a DFlash drafter)
  orthrus-run -hf Qwen/Qwen3-1.7B-GGUF:Q8_0       (a model from the Hugging Face Hub)
  cat notes.txt | orthrus-run model.gguf -p "Sum this up:"
  orthrus-run model.gguf                          (a chat; /help there tells more)"""

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}


def main(argv: Sequence[str] | None = None) -> int:
    """The `orthrus-run` command; returns the exit code."""
    return run_command(_parser(), _run, argv)


def _parser() -> Parser:
    parser = base_parser("orthrus-run", EXAMPLES, DESCRIPTION)
    parser.add_argument(
        "--log-verbose", dest="verbose", action="store_true", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--help-llama", action=HelpLlama, help="what each flag of llama.cpp does here"
    )
    add_answering_options(parser, add_prompt_options)
    parser.hint = " A prompt goes with -p"
    return parser


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """What to continue, how far, and how to show it."""
    group = parser.add_argument_group("prompt and output")
    group.add_argument(
        "-p",
        "--prompt",
        type=options.words,
        metavar="TEXT",
        help="the prompt; text that is piped in follows it, after a blank line",
    )
    group.add_argument(
        "-f", "--file", metavar="FILE", help="read it from FILE (- is stdin), and nothing else"
    )
    group.add_argument(
        "-sys", "--system-prompt", type=options.words, metavar="TEXT", help="system message"
    )
    group.add_argument(
        "-sysf", "--system-prompt-file", metavar="FILE", help="read the system message from FILE"
    )
    add_limit_options(group, context="context in tokens", predict="most tokens to generate")
    _add_text_options(group)
    _add_output_options(group)


def _add_text_options(group: argparse._ArgumentGroup) -> None:
    """What is text and what is not."""
    group.add_argument(
        "--stop",
        "-r",
        "--reverse-prompt",
        type=options.words,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT; repeatable",
    )
    group.add_argument(
        "--raw",
        "-no-cnv",
        "--no-conversation",
        action="store_true",
        help="no chat template: continue the prompt",
    )
    options.add_special_option(group)
    add_thinking_options(group)
    group.add_argument(
        "-e",
        "--escape",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=r"turn \n \t \r \" \' \\ in -p, -sys and --stop into what they stand for",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    """How the answer is shown."""
    group.add_argument("--json", action="store_true", help="print one JSON object, not the text")
    group.add_argument(
        "--json-stream",
        action="store_true",
        help='print {"piece": …, "origin": …} a line as text comes, and what --json prints last',
    )
    group.add_argument(
        "--explain", action="store_true", help="tell at the end what --strategy auto decided"
    )
    group.add_argument(
        "--show-drafts",
        action="store_true",
        help="colour the text by how it came about (drafted, corrected, plain), and sum it up",
    )
    group.add_argument(
        "--twice",
        action="store_true",
        help="answer plainly first, then with drafts in colours, and compare texts and speed",
    )
    group.add_argument(
        "--no-perf",
        "--no-show-timings",
        action="store_true",
        help="no statistics at the end (in a chat, --verbose: all of them)",
    )
    group.add_argument(
        "--perf",
        "--show-timings",
        dest="no_perf",
        action="store_false",
        default=False,
        help="statistics at the end (default)",
    )


def _run(args: argparse.Namespace) -> int:
    path = options.model_path(args)
    if args.escape:
        for name in ("prompt", "system_prompt"):
            if getattr(args, name) is not None:
                setattr(args, name, unescape(getattr(args, name)))
        args.stop = [unescape(text) for text in args.stop]
    if args.json and args.json_stream:
        raise OrthrusError("--json and --json-stream: both print to stdout; leave one of them out")
    if (args.json or args.json_stream) and args.show_drafts:
        raise OrthrusError("--show-drafts: --json prints no text to colour; leave one of them out")
    if args.twice and (args.json or args.json_stream):
        raise OrthrusError("--twice: it shows both answers, not JSON; leave one of the flags out")
    prompt = _prompt(args)
    if args.twice and prompt is None:
        raise OrthrusError("--twice: answers one prompt; give it with -p, -f or through a pipe")
    if args.system_prompt_file is not None:
        if args.system_prompt is not None:
            raise OrthrusError("give the system message with -sys or with -sysf, not with both")
        args.system_prompt = read_text("-sysf", args.system_prompt_file)
    with ExitStack() as resources:
        loaded = load(path, args, resources)
        system = [] if args.system_prompt is None else [Message("system", args.system_prompt)]
        if prompt is None:
            return _chat(loaded, system, args)
        return _answer(loaded, [*system, Message("user", prompt)], args)


def _chat(loaded: Loaded, system: list[Message], args: argparse.Namespace) -> int:
    """A conversation in the terminal; what it needs is not imported for one answer."""
    from orthrus_gguf.cli.chat import chat_loop
    from orthrus_gguf.cli.chat_commands import Statistics

    statistics = Statistics.ALL if args.verbose else Statistics.LINE
    code = chat_loop(
        loaded,
        system,
        seed=None if args.seed < 0 else args.seed,
        statistics=Statistics.OFF if args.no_perf else statistics,
        show_drafts=args.show_drafts,
    )
    if args.explain:
        say(explain(loaded.plan, loaded.policy))
    return code


def _prompt(args: argparse.Namespace) -> str | None:
    """The prompt's text, or None for a chat."""
    if args.prompt is not None and args.file is not None:
        raise OrthrusError("give the prompt with -p or with -f, not with both")
    if args.file is not None:
        return read_text("-f", args.file)
    piped = piped_text()
    if args.prompt is not None:
        return f"{args.prompt}\n\n{piped}" if piped else str(args.prompt)
    if not piped and (args.json or args.json_stream or not _in_terminal()):
        raise OrthrusError("no prompt: give -p TEXT, -f FILE, or pipe it in")
    return piped or None


def _in_terminal() -> bool:
    """Whether somebody can chat. Python has no stdin where it is closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_text(flag: str, name: str) -> str:
    """The text of the file that `flag` names (- is stdin); like llama.cpp, without the newline
    that editors add at the end."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OrthrusError(f"{flag} {name}: not UTF-8 text (at byte {error.start})") from error
    except OSError as error:
        raise OrthrusError(f"{flag} {name}: cannot be read: {error.strerror}") from error
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
    request = loaded.shortened(loaded.request(loaded.render(messages)), messages)
    loaded.tell(request)
    if args.twice:
        return answer_twice(loaded, request)
    generation = loaded.start(request)
    if args.json or args.json_stream:
        return _answer_json(loaded, request, generation, args)
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


def _answer_json(
    loaded: Loaded, request: Request, generation: Generation, args: argparse.Namespace
) -> int:
    """One prompt, one answer, for programs. What came before a Ctrl-C is printed all the same."""
    interrupted = False
    try:
        for piece in generation:
            if args.json_stream:
                print_json({"piece": piece, "origin": generation.origin.value})
    except KeyboardInterrupt:
        generation.cancel()
        interrupted = True
    answer = result_json(loaded.plan, request, generation.result)
    answer["timings"]["load_ms"] = loaded.seconds * 1e3
    answer["model"] = {
        "name": loaded.file.config.name,
        "files": [str(path) for path in loaded.file.paths],
        "runtime": loaded.model.description,
        "n_ctx": loaded.session.n_ctx,
    }
    if args.explain:
        answer["explanation"] = explanation_json(loaded.policy)
    if interrupted:
        answer["stopped"] = "interrupted"
    print_json(answer)
    if interrupted:
        raise KeyboardInterrupt
    return 0


def write(pieces: Iterable[str]) -> None:
    """Show text as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)
