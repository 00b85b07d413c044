"""`orthrus-bench simulate`: strategies side by side on hardware that is not at hand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from orthrus_gguf.auto.calibration import MachineCosts
from orthrus_gguf.auto.costs import Costs
from orthrus_gguf.auto.remembered import read_curve
from orthrus_gguf.bench.prediction.cards import CARDS, DEFAULT_SHARES
from orthrus_gguf.bench.prediction.passes import Activations, PredictedCurve
from orthrus_gguf.bench.prediction.shapes import FILE_TYPES
from orthrus_gguf.bench.prediction.table import MODELS, Selection, assumptions
from orthrus_gguf.bench.simulation import synthetic
from orthrus_gguf.bench.simulation.acceptance_tables import TABLES
from orthrus_gguf.bench.simulation.hardware import (
    CHAIN_SHARE,
    DRAFTER_SHARE,
    CardCosts,
    CurveCosts,
    FlatCosts,
)
from orthrus_gguf.bench.simulation.recording import Recording, blocks_in_words, load
from orthrus_gguf.bench.simulation.strategies import Simulator, default_strategies, runs
from orthrus_gguf.bench.simulation.tables import Simulation, as_json, markdown
from orthrus_gguf.cli import options
from orthrus_gguf.cli.drafter import open_drafter
from orthrus_gguf.cli.loaded import identity, say
from orthrus_gguf.command import Parser, base_parser, print_json, run_command
from orthrus_gguf.drafting.plan import SPELLING, parse_all
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.runtime.load import RuntimeSettings, load_model, resolve
from orthrus_gguf.this_machine import machine

EXAMPLES = (
    "orthrus-bench simulate --acceptance qwen3-8b --costs rtx-3090,rtx-4090,h200",
    "orthrus-bench simulate model.npz --costs flat            (rows are free)",
)
DESCRIPTION = """\
Replay recorded drafts, or drafts made up to have a published acceptance, against a cost curve, with
the real decode loop and the real controller. Nothing is measured: assumptions are printed beneath.

  orthrus-bench simulate model.npz --costs model.gguf      (its passes are timed here)

Beside the controller (auto), its control is shown: a naive bandit over eight fixed strategies.

How strategies are spelt:

"""

#: The name of hardware on which rows are free.
FLAT = "flat"


@dataclass(frozen=True)
class Hardware:
    """A source of costs. assumptions: what its figures rest on, a sentence or two each."""

    name: str
    costs: Costs
    assumptions: Sequence[str]


def main(argv: Sequence[str]) -> int:
    """Entry point of the subcommand, with the words after its name; returns the exit code."""
    return run_command(_parser(), _run, argv)


def _parser() -> Parser:
    parser = base_parser("orthrus-bench simulate", EXAMPLES, DESCRIPTION + SPELLING)
    group = parser.add_argument_group("drafts")
    group.add_argument(
        "recording", nargs="?", type=Path, metavar="REC.npz", help="made by orthrus-bench record"
    )
    group.add_argument(
        "--acceptance", choices=list(TABLES), help="make drafts up to have published acceptance"
    )
    group.add_argument(
        "-s", "--seed", type=options.natural, metavar="N", help="of such drafts (default: 0)"
    )
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--costs",
        required=True,
        metavar="NAME,…",
        help=f"of {', '.join(CARDS)} (predicted), {FLAT} (rows are free), a cost curve that was"
        " measured (.json, as orthrus-run keeps it), or FILE.gguf, whose passes are timed here",
    )
    group.add_argument(
        "--shape",
        choices=list(MODELS),
        default="qwen3-8b",
        help="model on predicted cards (default: qwen3-8b); of one with an MTP block, chains cost"
        " what is predicted",
    )
    group.add_argument(
        "--type",
        type=str.lower,
        choices=list(FILE_TYPES),
        default="q4_k_m",
        help="its type (default: q4_k_m)",
    )
    group.add_argument(
        "--context",
        type=options.natural,
        default=512,
        metavar="N",
        help="tokens in the cache before each prompt (default: 512)",
    )
    group.add_argument("-t", "--threads", type=options.positive, metavar="N", help="to time passes")
    group.add_argument(
        "--drafter", metavar="DRAFTER.gguf", help="beside FILE.gguf: its blocks are timed too"
    )
    parser.add_argument("--strategies", metavar="NAME,…", help="spelt as above (default: many)")
    parser.add_argument(
        "-o", "--output", choices=["md", "json"], default="md", help="format (default: md)"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    recording, sentences = _recording(args)
    if args.drafter is not None and ".gguf" not in args.costs:
        raise OrthrusError("--drafter goes with --costs FILE.gguf: its blocks are timed there")
    beside = recording.beside
    hardware = [_hardware(name.strip(), args, beside) for name in args.costs.split(",")]
    if beside is not None:
        what, share, source = "block of the drafter's network", DRAFTER_SHARE, "published"
        if beside.chain:
            what, share = "token of a chain", CHAIN_SHARE
            source = "by the bytes that a 27B model's reads in Q4_K_M"
        sentences.append(
            f"A {what} takes what was measured of it, and where it was not, {share} of the time of"
            f" a pass of one row ({source}), whatever the card; following the text takes none."
        )
    if args.strategies is None:
        strategies = default_strategies(recording.block_size, beside, lookup=recording.origin.real)
    else:
        strategies = parse_all(args.strategies)
    total = len(hardware) * len(recording.domains()) * runs(strategies)
    done = []
    with tqdm(total=total, desc="simulating", leave=False, disable=None) as bar:
        for item in hardware:
            outcomes = []
            for outcome in Simulator(recording, item.costs).outcomes(strategies):
                outcomes.append(outcome)
                bar.update()
            told = [*sentences, *item.assumptions]
            done.append(Simulation(item.name, _describe(recording), outcomes, told))
    if args.output == "json":
        print_json(as_json(done))
    else:
        print(markdown(done), end="")
    return 0


def _recording(args: argparse.Namespace) -> tuple[Recording, list[str]]:
    """The drafts, and what they rest on."""
    if (args.recording is None) == (args.acceptance is None):
        raise OrthrusError("name either a recording (REC.npz) or drafts (--acceptance NAME)")
    if args.acceptance is not None:
        table = TABLES[args.acceptance]
        made = synthetic.synthesize(args.acceptance, table, args.seed or 0)
        return made, synthetic.assumptions(args.acceptance, table)
    if args.seed is not None:
        raise OrthrusError("--seed goes with --acceptance: a recording has nothing to draw")
    recording = load(args.recording)
    return recording, [
        f"Drafts were recorded ({recording.origin.model}, {recording.origin.settings}), in"
        f" {blocks_in_words(recording)}; others are parts of the next larger ones."
    ]


def _describe(recording: Recording) -> str:
    origin = recording.origin
    return f"{origin.model}, {'recorded' if origin.real else 'made up'} ({origin.settings})"


def _hardware(name: str, args: argparse.Namespace, beside: Beside | None) -> Hardware:
    """beside: what drafts, if a network does."""
    if name == FLAT:
        return Hardware(
            "rows are free", FlatCosts(beside), ["Every pass takes 1 ms, whatever its rows."]
        )
    if name in CARDS:
        return _card(name, args, beside)
    path = Path(name)
    before = f"{args.context} tokens of context come before each prompt."
    if path.suffix == ".gguf":
        with ExitStack() as resources:
            file = resources.enter_context(ModelFile.open(path))
            settings = resolve(RuntimeSettings(threads=args.threads), say)
            chain = beside is not None and beside.chain
            drafter, _ = open_drafter(args.drafter, file, settings.name, resources, say, mtp=chain)
            loaded = load_model(file, settings, drafter=drafter)
            model = resources.enter_context(closing(loaded))
            curve = MachineCosts(model, identity(file), say).curve
            title = f"{file.config.name} on {model.description}, {machine()['cpu']}"
        told = [f"Costs of passes were measured here: {title}; lines between them.", before]
        return Hardware(title, CurveCosts(curve, args.context, beside), told)
    if path.suffix != ".json":
        raise OrthrusError(
            f"--costs {name}: expected one of {', '.join(CARDS)}, {FLAT}, a .json or a .gguf file"
        )
    try:
        curve = read_curve(path)
    except (OSError, ValueError) as error:
        raise OrthrusError(f"--costs {name}: not a measured cost curve ({error})") from error
    told = [f"Costs of passes were measured before ({path.name}); lines between them.", before]
    return Hardware(path.name, CurveCosts(curve, args.context, beside), told)


def _card(name: str, args: argparse.Namespace, beside: Beside | None) -> Hardware:
    config = MODELS[args.shape]
    curve = PredictedCurve(CARDS[name], config, args.type)
    selection = Selection(
        models=[args.shape],
        cards=[CARDS[name]],
        types=[args.type],
        contexts=[args.context],
        block=config.block_size or 0,
        depth=MtpFile.beside.most,
        activations=Activations.AUTO,
        shares=DEFAULT_SHARES,
    )
    title = (
        f"{curve.card.name}, {config.name} {args.type.upper()}, {args.context} tokens of context"
        " (predicted)"
    )
    return Hardware(title, CardCosts(curve, args.context, beside), assumptions(selection))
