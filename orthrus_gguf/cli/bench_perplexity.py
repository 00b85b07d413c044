"""`orthrus-bench perplexity`: how well a file predicts a text, and what it lost to another file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orthrus_gguf.bench.perplexity import Comparison, Difference, Estimate, Text, cut, window_logits
from orthrus_gguf.cli import options
from orthrus_gguf.cli.heads import open_model
from orthrus_gguf.cli.llama_flags import foreign
from orthrus_gguf.cli.loaded import say
from orthrus_gguf.command import Parser, base_parser, json_text, run_command
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer

EXAMPLES = (
    "orthrus-bench perplexity model.gguf wiki.test.raw",
    "orthrus-bench perplexity model-Q4_K_M.gguf wiki.test.raw --kl-base model-BF16.gguf",
)
DESCRIPTION = """\
Perplexity of the AR view on a text, by llama-perplexity's definition: windows of -c tokens, BOS
first where the vocabulary wants it, the second half of every window scored.

Several texts count as one, in their order."""

SMALLEST = 8  # tokens of a window: below, hardly anything is scored
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999, "largest": 1.0}
SNIPPET = 12  # tokens before a difference that are shown


def main(argv: Sequence[str]) -> int:
    """Entry point of the subcommand, with the words after its name; returns the exit code."""
    return run_command(_parser(), _run, argv)


def _parser() -> Parser:
    parser = base_parser("orthrus-bench perplexity", EXAMPLES, DESCRIPTION)
    options.add_model_options(parser)
    group = parser.add_argument_group("text")
    group.add_argument("texts", nargs="*", metavar="TEXT", help="text files, UTF-8")
    group.add_argument(
        "-f", "--file", action="append", default=[], metavar="TEXT", help="same; repeatable"
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=options.positive,
        default=512,
        metavar="N",
        help="tokens of a window (default: 512)",
    )
    group.add_argument(
        "--chunks",
        type=options.integer,
        default=-1,
        metavar="N",
        help="only the first N windows (default: -1, all)",
    )
    group.add_argument(
        "--kl-base",
        metavar="BASE.gguf",
        help="compare with this file of the same model: KL divergence, agreement, differences",
    )
    group.add_argument(
        "--kl-runtime",
        choices=[name.value for name in RuntimeName],
        help="run --kl-base on this runtime (default: the same): what arithmetic costs, where both"
        " files are one",
    )
    group.add_argument(
        "--differences",
        type=options.natural,
        default=5,
        metavar="N",
        help="largest differences to list, with --kl-base (default: 5)",
    )
    group.add_argument(
        "-o", "--output", choices=["md", "json"], default="md", help="format (default: md)"
    )
    parser.foreign, parser.scattered = foreign(parser), True
    return parser


def _run(args: argparse.Namespace) -> int:
    texts = [*args.texts, *args.file]
    if args.model is not None and (args.model_flag or args.hf_repo):
        texts.insert(0, args.model)  # with -m or -hf, the first word is a text too
        args.model = None
    path = options.model_path(args)
    if not texts:
        raise OrthrusError("no text: name at least one text file after the model")
    if args.ctx_size < SMALLEST:
        raise OrthrusError(f"-c {args.ctx_size}: a window has at least {SMALLEST} tokens")
    with ExitStack() as resources:
        file = resources.enter_context(open_model(path, args, say))
        tokenizer = _tokenizer(file)
        content = "".join(map(_read, texts))
        tokens = tokenizer.encode(content)
        windows = _windows(tokens, tokenizer, args)
        if args.kl_runtime is not None and args.kl_base is None:
            raise OrthrusError("--kl-runtime: name the file with --kl-base")
        model = _load(file, args, options.runtime_settings(args), resources)
        base = None if args.kl_base is None else _base(content, tokens, args, resources)
        text = _score(windows, model, base, args.batch_size)
        head = {
            "model": file.config.name,
            "runtime": model.description,
            "n_ctx": args.ctx_size,
            "windows": text.windows,
            "scored_tokens": text.scored,
        }
        largest = [] if base is None else text.largest(args.differences)
        differences = [_described(d, tokens, tokenizer) for d in largest]
    comparison = None if base is None else text.comparison()
    report = _json if args.output == "json" else _markdown
    print(report(head, text.perplexity, comparison, differences))
    return 0


def _windows(
    tokens: Sequence[int], tokenizer: Tokenizer, args: argparse.Namespace
) -> list[list[int]]:
    windows = cut(tokens, args.ctx_size, args.chunks)
    if not windows:
        raise OrthrusError("--chunks 0: nothing to score; give at least 1, or leave it out")
    if tokenizer.add_bos and tokenizer.bos is not None:
        for window in windows:
            window[0] = tokenizer.bos
    return windows


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OrthrusError(f"{name}: not UTF-8 text (at byte {error.start})") from error
    except OSError as error:
        raise OrthrusError(f"{name}: cannot be read: {error.strerror}") from error


def _tokenizer(file: ModelFile) -> Tokenizer:
    return load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)


def _load(
    file: ModelFile, args: argparse.Namespace, settings: RuntimeSettings, resources: ExitStack
) -> Model:
    if args.ctx_size > file.config.n_ctx_train:
        say(
            f"-c {args.ctx_size}: {file.paths[0]} was trained on {file.config.n_ctx_train} tokens"
            " of context only"
        )
    return resources.enter_context(closing(load_model(file, settings)))


def _base(
    content: str, tokens: Sequence[int], args: argparse.Namespace, resources: ExitStack
) -> Model:
    """The model to compare with. Raises OrthrusError unless it reads the text as the other does."""
    file = resources.enter_context(ModelFile.open(args.kl_base))
    if _tokenizer(file).encode(content) != list(tokens):
        raise OrthrusError(
            f"--kl-base {args.kl_base}: its vocabulary cuts the text into other tokens, so the two"
            " cannot be compared; name a file of the same model"
        )
    settings = options.runtime_settings(args)
    if args.kl_runtime is not None:
        settings = replace(settings, name=RuntimeName(args.kl_runtime))
        if settings.name is RuntimeName.REFERENCE:  # whose cache is in f32 only
            settings = replace(settings, cache_type_k=None, cache_type_v=None)
    return _load(file, args, settings, resources)


def _score(windows: list[list[int]], model: Model, base: Model | None, batch: int) -> Text:
    first = len(windows[0]) // 2
    text = Text(windows, first)
    ours = window_logits(model, windows, first, batch=batch)
    bar = tqdm(ours, "windows", total=len(windows), leave=False, disable=None)
    if base is None:
        for logits in bar:
            text.add(logits)
            bar.set_postfix_str(f"PPL {text.perplexity.value:.4f}")
    else:
        theirs = window_logits(base, windows, first, batch=batch)
        for logits, base_logits in zip(bar, theirs, strict=True):
            text.add(logits, base_logits)
            bar.set_postfix_str(f"PPL {text.perplexity.value:.4f}")
    return text


def _described(
    difference: Difference, tokens: Sequence[int], tokenizer: Tokenizer
) -> dict[str, Any]:
    """A difference in words that can be read: tokens as text."""
    before = tokens[max(0, difference.place - SNIPPET) : difference.place]
    return {
        "place": difference.place,
        "kl": difference.kl,
        "before": tokenizer.decode(before),
        "token": tokenizer.decode([difference.token], continuation=True),
        "p": difference.p,
        "p_base": difference.p_base,
        "top": tokenizer.decode([difference.top], continuation=True),
        "top_base": tokenizer.decode([difference.top_base], continuation=True),
    }


def _json(
    head: dict[str, Any],
    perplexity: Estimate,
    comparison: Comparison | None,
    differences: list[dict[str, Any]],
) -> str:
    report = {**head, "perplexity": perplexity.to_json()}
    if comparison is not None:
        report |= {
            "base_perplexity": comparison.base_perplexity.to_json(),
            "perplexity_ratio": comparison.perplexity_ratio.to_json(),
            "kl": {
                "mean": comparison.mean_kl.to_json(),
                **{name: comparison.kl_quantile(share) for name, share in QUANTILES.items()},
            },
            "rms_probability_change": comparison.rms_change.to_json(),
            "same_top": comparison.same_top.to_json(),
            "differences": differences,
        }
    return json_text(report)


def _markdown(
    head: dict[str, Any],
    perplexity: Estimate,
    comparison: Comparison | None,
    differences: list[dict[str, Any]],
) -> str:
    lines = [
        f"{head['model']} on {head['runtime']}",
        f"{head['windows']} windows of {head['n_ctx']} tokens, {head['scored_tokens']} scored",
        "",
    ]
    if comparison is None:
        return "\n".join([*lines, f"PPL = {perplexity.value:.4f} ± {perplexity.error:.5f}"])
    changes = comparison.probability_changes
    rows = [
        ("PPL", _with_error(perplexity)),
        ("PPL of the base", _with_error(comparison.base_perplexity)),
        ("PPL / base", _with_error(comparison.perplexity_ratio)),
        ("KL, mean", _with_error(comparison.mean_kl)),
        *(
            (f"KL, {name}", f"{comparison.kl_quantile(share):.6f}")
            for name, share in QUANTILES.items()
        ),
        ("Δp, root mean square", _with_error(comparison.rms_change, percent=True)),
        ("Δp, lowest … highest", f"{100 * changes.min():.3f} … {100 * changes.max():.3f} %"),
        ("same top token", _with_error(comparison.same_top, percent=True)),
    ]
    lines += ["| | |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows)]
    if differences:
        lines += [
            "",
            "| KL | the text | goes on with | p | of the base | likeliest | of the base |",
            "|--:|---|---|--:|--:|---|---|",
        ]
    lines += [
        f"| {d['kl']:.3f} | {_cell('…' + d['before'])} | {_cell(d['token'])} |"
        f" {100 * d['p']:.1f} % | {100 * d['p_base']:.1f} % | {_cell(d['top'])} |"
        f" {_cell(d['top_base'])} |"
        for d in differences
    ]
    return "\n".join(lines)


def _with_error(estimate: Estimate, *, percent: bool = False) -> str:
    if percent:
        return f"{100 * estimate.value:.3f} ± {100 * estimate.error:.3f} %"
    return f"{estimate.value:.6f} ± {estimate.error:.6f}"


def _cell(text: str) -> str:
    """Text of a model in a table: one line, and nothing that a terminal acts on."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return f"`{shown}`".replace("|", "\\|")
