"""Prompt and generation speed of the CPU runtime beside stock llama.cpp (the `xllamacpp` wheel).

    python tests/bench/compare_llamacpp.py BASE.gguf [-t THREADS …] [-r REPETITIONS]
                                           [--runtime ggml] [--plain] [--busy PROCESSES]

BASE.gguf is a stock file (`orthrus-convert --split` writes one). Both run in this process, turn by
turn, on the same threads, and the ratio is taken turn by turn: on a shared machine only the ratio
means something. `--busy` lets other processes compute meanwhile. `--plain` keeps llama.cpp to the
kernels that compute a row the same with and without company: no repacked weights (its
`--no-repack`) and no tiled products (GGML_CPU_TILED_MM=0). Prints a markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import xllamacpp

from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import Sampler, SamplingSettings

GREEDY = SamplingSettings(temperature=0)


class Stock:
    """llama.cpp as it comes, with its cache in f16 and one sequence."""

    def __init__(self, path: str, n_ctx: int, threads: int, plain: bool) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.verbosity = n_ctx, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if plain:
            params.no_extra_bufts = True
            os.environ["GGML_CPU_TILED_MM"] = "0"  # read when the first product runs
        self._server = xllamacpp.Server(params)

    def run(self, prompt: list[int], n_predict: int) -> tuple[float, float]:
        """Tokens per second of the prompt and of the generation, by llama.cpp's own clock."""
        answer: dict[str, Any] = self._server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": n_predict,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = answer["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]


class Ours:
    """One of our runtimes, plain decoding."""

    def __init__(self, model: Model, n_ctx: int) -> None:
        self._model = model
        self._cache = model.new_cache(n_ctx)

    def run(self, prompt: list[int], n_predict: int) -> tuple[float, float]:
        self._cache.restore(self._cache.checkpoint(0))
        config = self._model.config
        sequence = TokenSequence(config, self._cache, Sampler(GREEDY), list(prompt))
        started = time.perf_counter()
        drive(self._model, prefill(sequence))
        first = time.perf_counter()
        for _ in decode(self._model, sequence, FixedPolicy(PLAIN, config), n_predict - 1):
            pass
        ended = time.perf_counter()
        return len(prompt) / (first - started), max(n_predict - 1, 1) / (ended - first)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other processes compute meanwhile."""
    started = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("-t", "--threads", type=int, nargs="+", default=[1])
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--runtime", default="cpu", choices=["cpu", "ggml"])
    parser.add_argument("--busy", type=int, default=0, metavar="PROCESSES")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--predict", type=int, default=64)
    args = parser.parse_args()
    n_ctx = args.prompt + args.predict + 8
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(args.base))
        settings = [RuntimeSettings(RuntimeName(args.runtime), threads=t) for t in args.threads]
        models = [stack.enter_context(closing(load_model(file, each))) for each in settings]
        ids = np.random.default_rng(0).integers(0, file.config.n_vocab, args.prompt)
        prompt = [int(i) for i in ids]
        sides = {
            threads: (Ours(model, n_ctx), Stock(args.base, n_ctx, threads, args.plain))
            for threads, model in zip(args.threads, models, strict=True)
        }
        rates: dict[tuple[str, int], list[tuple[float, float]]] = {
            (name, threads): [] for name in ("prompt", "generation") for threads in args.threads
        }
        stack.enter_context(busy(args.busy))
        for turn in range(args.repetitions + 1):
            for threads, (ours, stock) in sides.items():
                pairs = (
                    (ours.run(prompt, 1)[0], stock.run(prompt, 1)[0]),
                    (ours.run(prompt[:4], args.predict)[1], stock.run(prompt[:4], args.predict)[1]),
                )
                if turn:  # the first turn warms up
                    rates["prompt", threads].append(pairs[0])
                    rates["generation", threads].append(pairs[1])
        print(
            f"{args.base}, {models[0].description}, xllamacpp {xllamacpp.__version__}"
            + (", plain" if args.plain else "")
            + (f", beside {args.busy} busy processes\n" if args.busy else "\n")
        )
        print("| | threads | ours, tok/s | llama.cpp, tok/s | ratio (median of turns, range) |")
        print("|---|--:|--:|--:|--:|")
        for (name, threads), values in rates.items():
            us, them = (statistics.median(column) for column in zip(*values, strict=True))
            ratios = sorted(a / b for a, b in values)
            print(
                f"| {name} | {threads} | {us:.1f} | {them:.1f} |"
                f" {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) |"
            )


if __name__ == "__main__":
    main()
