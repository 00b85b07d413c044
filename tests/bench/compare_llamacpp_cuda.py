"""One GPU, one base file: our CUDA runtime beside stock llama.cpp (llama-cpp-python, CUDA build).

    CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=86" pip install llama-cpp-python
    python tests/bench/compare_llamacpp_cuda.py BASE.gguf [--heads HEADS.gguf] [-r 5] [-d 512]

BASE.gguf is a stock Qwen3 file; the architecture is the card's (86: RTX 3090, 90: H100 and H200).
Both are loaded in this process and take turns: the time of passes of 1 to 64 rows after DEPTH
tokens of context, and generation. llama.cpp runs with everything on the GPU and flash attention on.
Prints a markdown table; t(rows)/t(1) of both is what the project is about. `--cpu` runs the
comparison on CPUs instead (our CPU runtime), to try this script without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]
import numpy as np

from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Draw, Model, ar_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings
from orthrus_gguf.this_machine import machine

ROWS = (1, 2, 4, 8, 16, 32, 64)
GREEDY = SamplingSettings(temperature=0)


class Stock:
    """llama.cpp through its C API, one sequence."""

    def __init__(self, path: str, n_ctx: int, *, cpu: bool) -> None:
        llama_cpp.llama_backend_init()
        wanted = llama_cpp.llama_model_default_params()
        wanted.n_gpu_layers = 0 if cpu else 999
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), wanted)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
        if cpu:
            params.n_threads = params.n_threads_batch = 1
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def run(self, tokens: list[int], start: int) -> None:
        """One pass that appends `tokens`, all logits wanted, and waits for it."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self._context)

    def rewind(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1)

    def generate(self, tokens: list[int], start: int, count: int) -> None:
        """Greedy decoding of `count` tokens, the argmax on the host as its own sampler has it."""
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        token = tokens[start]
        for i in range(count):
            self.run([token], start + i)
            logits = llama_cpp.llama_get_logits_ith(self._context, -1)
            token = int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())


class Ours:
    """Our runtime: passes through `forward`, generation as a session would run it."""

    def __init__(self, model: Model, n_ctx: int) -> None:
        self._model = model
        self._cache: Any = model.new_cache(n_ctx)
        self._sampler = Sampler(GREEDY)

    def _sequence(self, tokens: list[int]) -> TokenSequence:
        return TokenSequence(self._model.config, self._cache, self._sampler, list(tokens))

    def run(self, tokens: list[int], start: int) -> None:
        draw = Draw(self._sampler, [0] * (start + 1))
        self._model.forward([ar_segment(self._cache, tokens, start, draw=draw)])

    def fill(self, tokens: list[int]) -> None:
        drive(self._model, prefill(self._sequence(tokens)))

    def rewind(self, length: int) -> None:
        self._cache.restore(self._cache.checkpoint(length))

    def generate(self, tokens: list[int], start: int, count: int) -> None:
        policy = FixedPolicy(PLAIN, self._model.config)
        list(decode(self._model, self._sequence(tokens[: start + 1]), policy, count))


Side = Ours | Stock


def tests(
    tokens: list[int], depth: int, count: int
) -> Iterator[tuple[str, int, Callable[[Side], None]]]:
    """Name, what to divide the seconds by, what to run."""
    for rows in ROWS:

        def one_pass(side: Side, rows: int = rows) -> None:
            side.run(tokens[depth : depth + rows], depth)

        yield f"{rows} rows", 1, one_pass
    yield "a generated token", count, lambda side: side.generate(tokens, depth, count)


def turns(
    run: Callable[[Side], None], sides: tuple[Side, Side], depth: int, repetitions: int
) -> list[float]:
    """Median seconds of each side, turn by turn; the first turn warms up."""
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(repetitions + 1):
        for side, found in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            run(side)
            if turn:
                found.append(time.perf_counter() - started)
            side.rewind(depth)
    return [statistics.median(found) for found in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--heads")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-d", "--depth", type=int, default=512)
    parser.add_argument("-n", "--predict", type=int, default=64)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    depth, n_ctx = args.depth, args.depth + max(args.predict, ROWS[-1]) + 8
    name = RuntimeName.CPU if args.cpu else RuntimeName.CUDA
    settings = RuntimeSettings(name, threads=1 if args.cpu else None, context=n_ctx)
    with ModelFile.open(args.base, args.heads) as file:
        ids = np.random.default_rng(0).integers(0, file.config.n_vocab, n_ctx)
        tokens = [int(i) for i in ids]
        model = load_model(file, settings)
        ours, stock = Ours(model, n_ctx), Stock(args.base, n_ctx, cpu=args.cpu)
        ours.fill(tokens[:depth])
        for start in range(0, depth, 512):
            stock.run(tokens[start : min(start + 512, depth)], start)
        print(f"{machine()['cpu']}; {model.description}; llama_cpp {llama_cpp.__version__}\n")
        print("| | ours, ms | llama.cpp, ms | ours / its own first line | llama.cpp's |")
        print("|---|--:|--:|--:|--:|")
        first: tuple[float, float] | None = None
        for test, divisor, run in tests(tokens, depth, args.predict):
            us, them = (s / divisor for s in turns(run, (ours, stock), depth, args.repetitions))
            first = first or (us, them)
            print(
                f"| {test} | {us * 1e3:.3f} | {them * 1e3:.3f} |"
                f" {us / first[0]:.2f} | {them / first[1]:.2f} |"
            )
        model.close()


if __name__ == "__main__":
    main()
