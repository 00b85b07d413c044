"""Where the time of a prompt goes that llama.cpp does not need: our runtime with its kernels.

    python tests/bench/prompt_breakdown.py BASE.gguf [-p TOKENS] [-r TURNS]

One thread, one process, turn by turn: llama.cpp with and without flash attention; our runtime on
its own ggml, on llama.cpp's ggml, and there with the two kernels that it does without, because with
them a row's bits depend on its company: products of many rows at once (llamafile's for F16) and
tiled flash attention. Prints a markdown table of medians.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import xllamacpp

from orthrus_gguf.decode import prefill
from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.library import Library, load_library
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.ggml import graph, model
from orthrus_gguf.runtime.ggml.cache_layout import BATCH_ROWS, CacheLayout
from orthrus_gguf.runtime.ggml.model import GgmlModel

FLASH = xllamacpp.llama_flash_attn_type


@dataclass(frozen=True)
class Variant:
    """Our runtime. together, flash: with the kernels of these kinds for many rows."""

    library: Library
    rows: int = BATCH_ROWS
    together: bool = False
    flash: bool = False


def multiply_together(
    api: Ggml, context: int, weights: int, x: int, columns: int, rows: int
) -> int:
    """What `multiply_rows` does, but with the rows where ggml looks for many."""
    product = api.mul_mat(context, weights, api.reshape_2d(context, x, columns, rows))
    outputs = api.nbytes(product) // (4 * rows)
    return int(api.reshape_3d(context, product, outputs, 1, rows))


def our_run(file: ModelFile, variant: Variant, prompt: list[int]) -> Callable[[], float]:
    """A function that runs the prompt and returns tokens per second."""

    def patched() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(mock.patch.object(model, "load_library", return_value=variant.library))
        if variant.together:
            stack.enter_context(mock.patch.object(graph, "multiply_rows", multiply_together))
        if variant.flash:  # it takes values as they are
            plain = property(lambda layout: False)
            stack.enter_context(mock.patch.object(CacheLayout, "transposed", plain))
        return stack

    with patched():
        loaded = GgmlModel.load(file, threads=1, batch_rows=variant.rows)
        cache = loaded.new_cache(len(prompt) + 8)
    if variant.together or variant.flash:
        loaded._api.backend_cpu_set_use_ref(loaded._backend, False)

    def run() -> float:
        with patched():
            cache.truncate(0)
            started = time.perf_counter()
            prefill(loaded, cache, prompt)
            return len(prompt) / (time.perf_counter() - started)

    return run


def stock_run(path: Path, prompt: list[int], *, flash: bool) -> Callable[[], float]:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity = len(prompt) + 72, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if not flash:
        params.flash_attn_type = FLASH.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def run() -> float:
        answer: dict[str, Any] = server.handle_completions(
            {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": False}
        )
        return float(answer["timings"]["prompt_per_second"])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("-p", "--prompt", type=int, default=256)
    parser.add_argument("-r", "--turns", type=int, default=15)
    args = parser.parse_args()
    path = Path(str(xllamacpp.xllamacpp.__file__))
    api = Ggml(ctypes.CDLL(str(path)))
    own, theirs = load_library(), Library(api, api.version().decode(), path)
    with ModelFile.open(args.base) as file:
        ids = np.random.default_rng(0).integers(0, file.config.n_vocab, args.prompt)
        prompt = [int(i) for i in ids]
        runs = {
            "llama.cpp": stock_run(args.base, prompt, flash=True),
            "llama.cpp without flash attention": stock_run(args.base, prompt, flash=False),
        }
        variants = {
            f"ours, ggml {own.version}": Variant(own),
            "… 128 rows per pass": Variant(own, rows=128),
            "… 256 rows per pass": Variant(own, rows=256),
            f"ours, llama.cpp's ggml {theirs.version}": Variant(theirs),
            "… rows multiplied together": Variant(theirs, together=True),
            "… tiled flash attention": Variant(theirs, flash=True),
            "… both": Variant(theirs, together=True, flash=True),
        }
        runs |= {name: our_run(file, variant, prompt) for name, variant in variants.items()}
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.turns + 2):
            for name, run in runs.items():
                rate = run()
                if turn > 1:  # the first turns warm up
                    rates[name].append(rate)
    print(
        f"{args.base}, {args.prompt} tokens, {args.turns} turns, xllamacpp {xllamacpp.__version__}"
    )
    print("| | tok/s | µs per token | of llama.cpp's speed |\n|---|--:|--:|--:|")
    for name, values in rates.items():
        rate = statistics.median(values)
        ratios = sorted(a / b for a, b in zip(values, rates["llama.cpp"], strict=True))
        print(
            f"| {name} | {rate:,.0f} | {1e6 / rate:.1f} |"
            f" {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) |"
        )


if __name__ == "__main__":
    main()
