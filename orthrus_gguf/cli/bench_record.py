"""`orthrus-bench record`: what is drafted at every position of a model's texts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from tqdm import tqdm

from orthrus_gguf.bench.comparison.prompts import BUILTIN, Prompt, encode, read_texts
from orthrus_gguf.bench.simulation.record import default_sizes, record_text
from orthrus_gguf.bench.simulation.recording import Origin, Recording, Text, blocks_in_words
from orthrus_gguf.cli import options
from orthrus_gguf.cli.drafter import add_drafter_option, open_drafter
from orthrus_gguf.cli.heads import open_model
from orthrus_gguf.cli.loaded import say
from orthrus_gguf.command import Parser, base_parser, run_command
from orthrus_gguf.drafting.plan import FixedPolicy, Plan, Strategy
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.writer import check_target
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.load import load_model
from orthrus_gguf.sampling import Sampler, SamplingSettings
from orthrus_gguf.text.chat import ChatTemplate
from orthrus_gguf.text.tokenizer import load_tokenizer

EXAMPLES = (
    "orthrus-bench record model.gguf -o model.npz",
    "orthrus-bench record base.gguf --drafter drafter.gguf -o drafter.npz",
    "orthrus-bench simulate model.npz --costs rtx-3090",
)
DESCRIPTION = """\
Continue prompts greedily, and record what blocks of the model's diffusion heads, and of --drafter,
draft at every position of the texts. With a recording, orthrus-bench simulate replays strategies on
other hardware."""

GREEDY = SamplingSettings(temperature=0)


def main(argv: Sequence[str]) -> int:
    """Entry point of the subcommand, with the words after its name; returns the exit code."""
    return run_command(_parser(), _run, argv)


def _parser() -> Parser:
    parser = base_parser("orthrus-bench record", EXAMPLES, DESCRIPTION)
    options.add_model_options(parser)
    add_drafter_option(parser)
    group = parser.add_argument_group("what to record")
    group.add_argument(
        "-o", "--output", type=Path, required=True, metavar="REC.npz", help="the recording"
    )
    group.add_argument(
        "--prompts",
        default=BUILTIN,
        metavar="FILE",
        help='JSON: {"domain": ["prompt", …], …} (default: builtin, those of compare)',
    )
    group.add_argument(
        "--domains",
        type=lambda text: tuple(part.strip() for part in text.split(",")),
        default=(),
        metavar="NAME,…",
        help="only these",
    )
    group.add_argument(
        "-n",
        "--n-gen",
        type=options.positive,
        default=128,
        metavar="N",
        help="most tokens per prompt (default: 128)",
    )
    group.add_argument(
        "--rows",
        type=options.listed(options.positive, "8,16"),
        metavar="N,…",
        help="rows of the heads' blocks, beside the full size (default: a half and a quarter of"
        " it); others are replayed as parts of larger ones",
    )
    group.add_argument("--overwrite", action="store_true", help="replace REC.npz if it exists")
    return parser


def _run(args: argparse.Namespace) -> int:
    path = options.model_path(args)
    texts = read_texts(args.prompts, args.domains)
    check_target(args.output, overwrite=args.overwrite)
    with ExitStack() as resources:
        file = resources.enter_context(open_model(path, args, say))
        settings = options.runtime_settings(args)
        drafter, config = open_drafter(args.drafter, file, settings.name, resources, say, mtp=False)
        if config.beside is not None and config.beside.chain:
            raise OrthrusError(
                f"{args.drafter}: recordings are of drafters that draft blocks, and this one drafts"
                " chains"
            )
        if not config.has_heads and drafter is None:
            raise OrthrusError(
                f"{path}: no diffusion heads, so nothing drafts; name a heads file with --heads, or"
                " a drafter with --drafter"
            )
        sizes = _sizes(args.rows, config.block_size if config.has_heads else None)
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
        template = ChatTemplate.from_metadata(file.metadata, tokenizer)
        prompts = encode(texts, tokenizer, template)
        n_ctx = min(max(len(prompt.tokens) for prompt in prompts) + args.n_gen, config.n_ctx_train)
        loaded = load_model(file, settings, drafter=drafter)
        model = resources.enter_context(closing(loaded))
        session = Session(model, tokenizer, n_ctx, prompt_batch=args.batch_size)
        recorded = [
            text
            for prompt in tqdm(prompts, "recording", unit=" texts", leave=False, disable=None)
            if (text := _record(session, prompt, args.n_gen, sizes)) is not None
        ]
        told = f"{args.prompts} prompts, up to {args.n_gen} tokens, {model.description}"
    if not recorded:
        raise OrthrusError("every text ended with its first token: nothing to record")
    recording = Recording(
        Origin(config.name, True, told),
        sizes[-1] if sizes else None,
        tuple(recorded),
        None if config.beside is None else config.beside.block,
    )
    recording.save(args.output)
    say(f"{args.output}: {len(recorded)} texts, {blocks_in_words(recording)}")
    return 0


def _sizes(rows: Sequence[int] | None, block_size: int | None) -> tuple[int, ...]:
    """Of the blocks of heads; empty without heads."""
    if block_size is None:
        if rows:
            raise OrthrusError("--rows: of blocks of diffusion heads, and there are none; leave it")
        return ()
    sizes = tuple(sorted({*rows, block_size})) if rows else default_sizes(block_size)
    if not 2 <= sizes[0] <= sizes[-1] <= block_size:
        raise OrthrusError(f"--rows: a block has 2 to {block_size} rows here")
    return sizes


def _record(session: Session, prompt: Prompt, n_gen: int, sizes: Sequence[int]) -> Text | None:
    """One prompt; None if its text ends at once."""
    policy = FixedPolicy(Plan(Strategy.TWO_PASS), session.model.config)
    generation = session.generate(Request(prompt.tokens, GREEDY, policy, n_gen))
    for _ in generation:
        pass
    output = generation.result.output
    if len(output) < 2:
        return None
    return record_text(session.model, Sampler(GREEDY), prompt.domain, prompt.tokens, output, sizes)
