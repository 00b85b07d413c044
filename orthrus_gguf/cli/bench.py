"""orthrus-bench: how fast a model runs here, in the manner of llama-bench."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes time to import
    from orthrus_gguf.entry import start

    start("bench")

import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from orthrus_gguf.bench.benchmark import (
    BenchmarkSettings,
    Measurement,
    peak_memory,
    run_benchmark,
)
from orthrus_gguf.cli import (
    bench_compare,
    bench_perplexity,
    bench_predict,
    bench_record,
    bench_simulate,
    bench_synthetic,
    options,
)
from orthrus_gguf.cli.drafter import add_drafter_option, open_drafter
from orthrus_gguf.cli.heads import open_model
from orthrus_gguf.cli.llama_flags import foreign
from orthrus_gguf.cli.loaded import say
from orthrus_gguf.command import Parser, base_parser, json_text, report, run_command
from orthrus_gguf.errors import OrthrusError, did_you_mean
from orthrus_gguf.gguf import keys
from orthrus_gguf.runtime.limits import usable_threads
from orthrus_gguf.runtime.load import RuntimeName, load_model, resolve
from orthrus_gguf.this_machine import machine

EXAMPLES = ("orthrus-bench model.gguf", "orthrus-bench compare model.gguf")
DESCRIPTION = """\
Measure prompt speed (pp), generation speed (tg), with the columns of llama-bench (t/s: mean and
standard deviation), and the time of passes of several rows, in the AR view ("ar 16") and as a
diffusion block ("diffusion 16"), or as a block of --drafter ("drafter 16"): medians over
repetitions.

  orthrus-bench model.gguf -p 0 -n 0 --rows 1,8,16,32 -d 4096 -o json
  orthrus-bench --synthetic qwen3-8b --type Q4_K_M      (a model of random weights, made first)
  orthrus-bench compare --help                          (strategies side by side, on prompts)
  orthrus-bench perplexity --help                       (of a text; and two files compared on it)
  orthrus-bench predict --help                          (times of other hardware, by arithmetic)
  orthrus-bench record --help                           (drafts of a model, for simulate)
  orthrus-bench simulate --help                         (strategies on other hardware)"""

PROGRAM = "orthrus-bench"

#: First words that are commands of their own, each with its own flags. (A model file of that name
#: can be given as ./predict.)
COMMANDS = {
    "compare": bench_compare.main,
    "perplexity": bench_perplexity.main,
    "predict": bench_predict.main,
    "record": bench_record.main,
    "simulate": bench_simulate.main,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `orthrus-bench` command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    if words and words[0].isalpha() and not Path(words[0]).exists():
        close = did_you_mean(words[0], COMMANDS)
        if close:
            return report(PROGRAM, OrthrusError(f"no file {words[0]}{close}"), verbose=False)
    if any(word.partition("=")[0] == "--prompts" for word in words):
        return bench_compare.main(words)  # "compare" may be left out where prompts are named
    return run_command(_parser(), _run, words)


def _parser() -> Parser:
    parser = base_parser(PROGRAM, EXAMPLES, DESCRIPTION)
    options.add_model_options(parser)
    add_drafter_option(parser)
    group = parser.add_argument_group("tests")

    def add(*flags: str, default: int, text: str) -> None:
        kind = options.positive if flags[0] == "-r" else options.natural
        group.add_argument(
            *flags, type=kind, default=default, metavar="N", help=f"{text} (default: {default})"
        )

    add("-p", "--n-prompt", default=512, text="prompt tokens; 0 leaves the test out")
    add("-n", "--n-gen", default=128, text="generated tokens; 0 leaves the test out")
    add("-d", "--n-depth", default=0, text="tokens in the cache before each test")
    add("-r", "--repetitions", default=5, text="repetitions that count")
    group.add_argument(
        "--rows",
        type=options.listed(options.positive, "1,8,32"),
        default=(1, 2, 4, 8, 16, 32),
        metavar="N,N,…",
        help="row counts of the pass-time tests; empty leaves them out (default: 1,2,4,8,16,32)",
    )
    group.add_argument(
        "-o", "--output", choices=list(WRITERS), default="md", help="format (default: md)"
    )
    bench_synthetic.add_options(parser)
    parser.foreign = foreign(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.synthetic is None:
        bench_synthetic.check_unused(args)
        return _bench(options.model_path(args), args)
    path = str(bench_synthetic.make(args))
    if args.make_only:
        print(path)
        return 0
    return _bench(path, args)


def _bench(path: str, args: argparse.Namespace) -> int:
    """Measure the model in the file `path` and print the figures."""
    settings = BenchmarkSettings(
        prompt=args.n_prompt,
        generate=args.n_gen,
        rows=args.rows,
        depth=args.n_depth,
        repetitions=args.repetitions,
        batch=args.batch_size,
    )
    with open_model(path, args, say) as file, ExitStack() as resources:
        asked = resolve(options.runtime_settings(args), say, file.config)
        drafter, _ = open_drafter(args.drafter, file, asked.name, resources, say)
        loaded = load_model(file, asked, drafter=drafter)
        model = resources.enter_context(closing(loaded))
        results = []
        for measurement in run_benchmark(model, settings):
            results.append(measurement)
            if sys.stderr.isatty():
                say(f"{measurement.test}: {measurement.median * 1e3:.2f} ms")
        backend = model.description.partition(" ")[0]
        head = {
            "model": file.config.name,
            "parameters": sum(math.prod(info.shape) for info in file.tensors.values()),
            "file_bytes": sum(info.n_bytes for info in file.tensors.values()),
            "runtime": model.description,
            "backend": backend,
            "threads": _threads(backend, args),
            "depth": args.n_depth,
            "repetitions": args.repetitions,
            "peak_memory_bytes": peak_memory(),
            **machine(),
            "synthetic": file.metadata.get(keys.SYNTHETIC) is True,
        }
    print(WRITERS[args.output](head, results), end="")
    return 0


def _threads(backend: str, args: argparse.Namespace) -> int | None:
    """Threads that a CPU runtime took; None for others."""
    on_cpu = backend in (RuntimeName.CPU.value, RuntimeName.GGML.value)
    return usable_threads(args.threads, lambda text: None) if on_cpu else None


def _records(results: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One record per test; `ratio` compares a pass with the pass of fewest rows of its view."""
    first: dict[str, float] = {}
    records = []
    for m in results:
        kind = m.test.split()[0]
        is_pass = " " in m.test
        records.append(
            {
                "test": m.test,
                "ms": m.median * 1e3,
                "spread": m.spread,
                "tokens_per_second": m.per_second,
                "avg_ts": m.average[0],
                "stddev_ts": m.average[1],
                "ratio": m.median / first.setdefault(kind, m.median) if is_pass else None,
            }
        )
    return records


def _markdown(head: dict[str, Any], results: Sequence[Measurement]) -> str:
    peak = head["peak_memory_bytes"]
    lines = [
        f"{head['model']}, {head['file_bytes'] / 1e6:.1f} MB of weights, on {head['runtime']}",
        f"{head['cpu']}, {head['system']}, Python {head['python']},"
        f" orthrus-gguf {head['orthrus-gguf']}; depth {head['depth']},"
        f" {head['repetitions']} repetitions"
        + ("" if peak is None else f", peak memory {peak / 1e6:.0f} MB"),
        *([f"**{bench_synthetic.LABEL}**"] if head["synthetic"] else []),
        "",
    ]
    speeds = [m for m in results if " " not in m.test]
    passes = [record for record in _records(results) if record["ratio"] is not None]
    if speeds:
        lines += [*_llama_bench(head, speeds), *([""] if passes else [])]
    if passes:
        lines += ["| pass of rows | ms | ± | tokens/s | × fewest rows |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {r['test']} | {r['ms']:.2f} | {100 * r['spread']:.0f} % |"
        f" {r['tokens_per_second']:.1f} | {r['ratio']:.2f} |"
        for r in passes
    ]
    return "\n".join(lines) + "\n"


def _llama_bench(head: dict[str, Any], results: Sequence[Measurement]) -> list[str]:
    """The columns of llama-bench's table, for laying one beside the other."""
    depth = f" @ d{head['depth']}" if head["depth"] else ""
    model = (
        f"{head['model']} | {_size(head['file_bytes'])} | {_count(head['parameters'])} |"
        f" {head['backend']} | {'' if head['threads'] is None else head['threads']}"
    )
    return [
        "| model | size | params | backend | threads | test | t/s |",
        "|---|--:|--:|---|--:|--:|--:|",
        *(
            f"| {model} | {m.test}{depth} | {m.average[0]:.2f} ± {m.average[1]:.2f} |"
            for m in results
        ),
    ]


def _size(n_bytes: int) -> str:
    gib = n_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{n_bytes / 2**20:.2f} MiB"


def _count(parameters: int) -> str:
    billions = parameters >= 1e9
    return f"{parameters / (1e9 if billions else 1e6):.2f} {'B' if billions else 'M'}"


def _json(head: dict[str, Any], results: Sequence[Measurement]) -> str:
    return json_text({**head, "tests": _records(results)}) + "\n"


def _csv(head: dict[str, Any], results: Sequence[Measurement]) -> str:
    text = io.StringIO()
    records = [{**head, **record} for record in _records(results)]
    writer = csv.DictWriter(text, fieldnames=list(records[0]) if records else list(head))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


WRITERS = {"md": _markdown, "json": _json, "csv": _csv}
