"""`--prefill-drafter`: prompts are shortened before the model reads them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from orthrus_gguf.cli import options
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from orthrus_gguf.prefill.compression import Compression, Compressor

#: Runtimes that tell what rows attend to.
RUNTIMES = (RuntimeName.CPU, RuntimeName.REFERENCE)

KEEP, THRESHOLD = 0.2, 2048
SELF = "self:"


def add_prefill_options(parser: argparse.ArgumentParser) -> None:
    """What may change the text, and is off unless it is named."""
    group = parser.add_argument_group("long prompts (lossy: the answer may change; off by default)")
    group.add_argument(
        "--prefill-drafter",
        metavar="SMALL.gguf|self:N",
        help="let a small model, or the first N layers of this one, choose the parts of a long"
        " prompt that are read; every result says so",
    )
    group.add_argument(
        "--prefill-keep",
        type=options.number,
        metavar="SHARE",
        help="share of the messages' text to keep; system and tool messages and the ends of a"
        f" prompt stay (default: {KEEP})",
    )
    group.add_argument(
        "--prefill-threshold",
        type=options.natural,
        metavar="TOKENS",
        help=f"read prompts whole up to here, and turns that add no more (default: {THRESHOLD})",
    )


def check_prefill_options(args: argparse.Namespace, settings: RuntimeSettings) -> None:
    """Raises OrthrusError for flags that make no sense, before anything is loaded. settings: with
    the runtime that was chosen."""
    named = {"keep": args.prefill_keep, "threshold": args.prefill_threshold}
    if args.prefill_drafter is None:
        for name, value in named.items():
            if value is not None:
                raise OrthrusError(
                    f"--prefill-{name}: nothing chooses what to keep; name it with"
                    " --prefill-drafter"
                )
        return
    _compression(args)
    if settings.name not in RUNTIMES:
        raise OrthrusError(
            f"--prefill-drafter: --runtime {settings.name.value} does not tell what a model attends"
            " to; use --runtime cpu"
        )
    if args.prefill_drafter.startswith(SELF):
        _first_layers(args.prefill_drafter)


def open_compressor(
    args: argparse.Namespace,
    file: ModelFile,
    model: Model,
    tokenizer: Tokenizer,
    settings: RuntimeSettings,
    resources: ExitStack,
    say: Callable[[str], None],
) -> Compressor | None:
    """What shortens prompts, if the flags ask for it. settings: of the model, with its context.
    say: takes a line about what may be less than expected.

    Raises OrthrusError.
    """
    asked = args.prefill_drafter
    if asked is None:
        return None
    from orthrus_gguf.prefill.compression import Compressor
    from orthrus_gguf.prefill.scorer import Scorer, layers_of

    compression = _compression(args)
    if compression.threshold >= (settings.context or 0):
        raise OrthrusError(
            f"--prefill-threshold {compression.threshold}: no prompt is longer, since the context"
            f" has {settings.context} tokens; use less, or raise -c"
        )
    if asked.startswith(SELF):
        own = model.model if isinstance(model, ModelWithDrafter) else model
        _check_attentive(own)
        layers = layers_of(file.config, _first_layers(asked))
        name = f"the first {layers[-1] + 1} of its {file.config.n_layers} layers"
        return Compressor(Scorer(name, own, layers, tokenizer), compression)
    small = resources.enter_context(ModelFile.open(asked))
    trained = small.config.n_ctx_train
    if trained < (settings.context or 0):
        say(
            f"--prefill-drafter {asked}: was trained for {trained} tokens of context; it may miss"
            " what matters in longer prompts"
        )
    theirs = load_tokenizer(small.metadata, path=small.paths[0], n_vocab=small.config.n_vocab)
    scorer = load_model(small, settings)
    resources.enter_context(closing(scorer))
    _check_attentive(scorer)
    other = None if theirs.same_ids(tokenizer) else theirs
    layers = layers_of(small.config, None)
    return Compressor(Scorer(small.config.name, scorer, layers, tokenizer, other), compression)


def _check_attentive(model: Model) -> None:
    """Raises OrthrusError for a model that ggml runs, as it may where the CPU runtime was asked
    for."""
    from orthrus_gguf.runtime.attention import Attentive

    if not isinstance(model, Attentive):
        raise OrthrusError(
            f"--prefill-drafter: {model.description} does not tell what a model attends to; use"
            " --runtime reference, or build the CPU kernels"
        )


def _compression(args: argparse.Namespace) -> Compression:
    from orthrus_gguf.prefill.compression import Compression

    keep = KEEP if args.prefill_keep is None else args.prefill_keep
    threshold = THRESHOLD if args.prefill_threshold is None else args.prefill_threshold
    try:
        return Compression(keep, threshold)
    except OrthrusError as error:
        raise OrthrusError(f"--prefill-keep {error}") from None


def _first_layers(text: str) -> int:
    """N of self:N."""
    count = text.removeprefix(SELF)
    if not count.isdecimal():
        raise OrthrusError(f"--prefill-drafter {text}: expected self:N, N a number of layers")
    return int(count)
