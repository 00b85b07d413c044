"""`orthrus-bench compare`: strategies and widths side by side, on the same prompts in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orthrus_gguf.auto.calibration import MachineCosts
from orthrus_gguf.bench.comparison import plots, prompts, tables
from orthrus_gguf.bench.comparison.entries import DEFAULT, default, entries, spread
from orthrus_gguf.bench.comparison.runner import Turn, run_turns, warm_up
from orthrus_gguf.cli import bench_synthetic, options
from orthrus_gguf.cli.drafter import add_drafter_option, open_drafter
from orthrus_gguf.cli.heads import open_model
from orthrus_gguf.cli.llama_flags import foreign
from orthrus_gguf.cli.loaded import identity, say
from orthrus_gguf.command import Parser, base_parser, json_text, run_command
from orthrus_gguf.drafting.plan import SPELLING, Plan, parse_all
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import load_model, resolve
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.chat import ChatTemplate
from orthrus_gguf.text.tokenizer import load_tokenizer
from orthrus_gguf.this_machine import machine

EXAMPLES = (
    "orthrus-bench compare model.gguf",
    "orthrus-bench compare model.gguf --prompts mine.json",
)
DESCRIPTION = (
    """\
Compare strategies and widths on the same prompts, in turns: every prompt is done by all of them
before the next one is. Their texts must be the same; if one differs, the comparison ends with an
error. Plain decoding (ar) always takes part.

  orthrus-bench compare model.gguf --strategies two-pass,fused,auto --widths 3,7,15 --plots plots
  orthrus-bench model.gguf --prompts mine.json --temp 0.8 -r 3 -o both     (compare may be left out)

How strategies are spelt:

"""
    + SPELLING
)

#: Values of --output.
MARKDOWN, JSON, BOTH = "md", "json", "both"


def main(argv: Sequence[str]) -> int:
    """Entry point of the subcommand, with the words after its name; returns the exit code."""
    return run_command(_parser(), _run, argv)


def _parser() -> Parser:
    parser = base_parser("orthrus-bench compare", EXAMPLES, DESCRIPTION)
    # Sampling flags that this command lacks: unset, as if they had not been given.
    parser.set_defaults(**{field: None for _, field, _, _ in options.SAMPLING_FLAGS})
    options.add_model_options(parser)
    add_drafter_option(parser)
    _add_choice(parser.add_argument_group("what to compare"))
    _add_generation(parser.add_argument_group("generation"))
    group = parser.add_argument_group("output")
    group.add_argument("--plots", type=Path, metavar="FOLDER", help="put pictures (PNG) there")
    group.add_argument(
        "-o",
        "--output",
        choices=[MARKDOWN, JSON, BOTH],
        default=MARKDOWN,
        help="tables, one JSON line with everything, or that line after the tables (default: md)",
    )
    parser.foreign = foreign(parser)
    return parser


def _add_choice(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts",
        default=prompts.BUILTIN,
        metavar="FILE",
        help='JSON: {"domain": ["prompt", …], …}; prompts of the domains chat, "chat code" and the'
        " like go through the chat template, if the model has one, all others are continued as they"
        " are (default:"
        f" {prompts.BUILTIN}, the set that comes with this program)",
    )
    group.add_argument("--domains", type=_names, default=(), metavar="NAME,…", help="only these")
    group.add_argument(
        "--strategies",
        metavar="NAME,…",
        help=f"spelt as above (default: {','.join(DEFAULT)})",
    )
    group.add_argument(
        "--widths",
        type=options.listed(options.positive, "3,7,15"),
        default=(),
        metavar="N,…",
        help="widths of every two-pass and fused that names none (default: block size - 1)",
    )


def _add_generation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-n",
        "--n-gen",
        type=_at_least_two,
        default=128,
        metavar="N",
        help="most tokens per prompt (default: 128)",
    )
    group.add_argument(
        "-r",
        "--repetitions",
        type=options.positive,
        default=1,
        metavar="N",
        help="rounds over all prompts; from 2 on, their scatter is shown (default: 1)",
    )
    group.add_argument(
        "--temp",
        dest="temperature",
        type=options.number,
        default=0.0,
        metavar="T",
        help="temperature (default: 0, greedy); filters are the file's, else orthrus-run's",
    )
    group.add_argument(
        "-s", "--seed", type=options.natural, default=0, metavar="N", help="seed (default: 0)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="never end by itself")


def _run(args: argparse.Namespace) -> int:
    path = options.model_path(args)
    texts = prompts.read_texts(args.prompts, args.domains)
    named = None if args.strategies is None else parse_all(args.strategies)
    if args.plots is not None:
        _prepare_folder(args.plots)
    with open_model(path, args, say) as file, ExitStack() as resources:
        settings = resolve(options.runtime_settings(args), say, file.config)
        drafter, config = open_drafter(args.drafter, file, settings.name, resources, say)
        file.prefetch(heads=True)
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
        template = ChatTemplate.from_metadata(file.metadata, tokenizer)
        chosen = prompts.encode(texts, tokenizer, template)
        n_ctx = _context(file, chosen, args.n_gen)
        sampling = options.sampling_settings(args, file.metadata, tokenizer.eog)
        named = spread(named or default(config), args.widths)
        settings = replace(settings, context=n_ctx)
        with closing(load_model(file, settings, drafter=drafter)) as model:
            session = Session(model, tokenizer, n_ctx, prompt_batch=args.batch_size)
            costs = partial(MachineCosts, model, identity(file), say)
            turns = _compare(session, named, costs, chosen, sampling, args)
            head = _head(args, file, model, sampling, template)
            if args.plots is not None:
                title = f"{head['model']} on {head['runtime']}, {head['cpu']}"
                for picture in plots.draw_all(args.plots, title, turns, costs().curve):
                    say(f"wrote {picture}")
    _print(head, turns, args.output)
    return 0


def _compare(
    session: Session,
    named: Sequence[Plan],
    costs: Callable[[], MachineCosts],
    chosen: Sequence[prompts.Prompt],
    sampling: SamplingSettings,
    args: argparse.Namespace,
) -> list[Turn]:
    """All turns; how far they are on stderr."""
    compared = entries(named, session.model.config, costs)
    warm_up(session, compared, chosen[0], sampling)
    total = args.repetitions * len(chosen) * len(compared)
    turns = run_turns(
        session, compared, chosen, sampling, max_tokens=args.n_gen, rounds=args.repetitions
    )
    return list(tqdm(turns, "comparing", total, unit=" texts", leave=False, disable=None))


def _head(
    args: argparse.Namespace,
    file: ModelFile,
    model: Model,
    sampling: SamplingSettings,
    template: ChatTemplate | None,
) -> dict[str, Any]:
    """What was compared where."""
    return {
        "model": file.config.name,
        "runtime": model.description,
        **machine(),
        "chat_template": template is not None,
        "prompts": args.prompts,
        "n_gen": args.n_gen,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "repetitions": args.repetitions,
        "synthetic": file.metadata.get(keys.SYNTHETIC) is True,
    }


def _prepare_folder(folder: Path) -> None:
    """Before the long part: raise OrthrusError if pictures cannot be drawn and put there."""
    reason = plots.why_unusable()
    if reason is not None:
        raise OrthrusError(f"--plots: {reason}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OrthrusError(
            f"--plots {folder}: cannot be made a folder ({error.strerror})"
        ) from error


def _context(file: ModelFile, chosen: Sequence[prompts.Prompt], n_gen: int) -> int:
    """Tokens that prompts and answers need. Raises OrthrusError if a prompt fills the context."""
    longest, limit = max(chosen, key=lambda prompt: len(prompt.tokens)), file.config.n_ctx_train
    if len(longest.tokens) >= limit:
        raise OrthrusError(
            f"--prompts: prompt {longest.name!r} has {len(longest.tokens)} tokens, the context of"
            f" {file.config.name} {limit}; shorten it"
        )
    return min(len(longest.tokens) + n_gen, limit)


def _print(head: dict[str, Any], turns: Sequence[Turn], output: str) -> None:
    if output != JSON:
        print(_heading(head, turns))
        print(tables.markdown(turns), end="")
    if output != MARKDOWN:
        line = json_text({**head, **tables.as_json(turns)})
        print(f"\n{line}" if output == BOTH else line)


def _heading(head: dict[str, Any], turns: Sequence[Turn]) -> str:
    count = len({turn.prompt.name for turn in turns})
    greedy = head["temperature"] <= 0
    mode = "greedy" if greedy else f"temperature {head['temperature']:g}, seed {head['seed']}"
    rounds = head["repetitions"]
    lines = [
        f"{head['model']} on {head['runtime']}",
        f"{head['cpu']}, {head['system']}, Python {head['python']},"
        f" orthrus-gguf {head['orthrus-gguf']}; {count} prompt{'s' if count > 1 else ''}"
        f" ({head['prompts']}), up to"
        f" {head['n_gen']} tokens each, {mode}, {rounds} round{'s' if rounds > 1 else ''}",
        *([f"**{bench_synthetic.LABEL}**"] if head["synthetic"] else []),
    ]
    return "\n".join(lines) + "\n"


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _at_least_two(text: str) -> int:
    """argparse type. The first token comes with the prompt's pass, so one alone has no speed."""
    value = options.integer(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 2")
    return value
