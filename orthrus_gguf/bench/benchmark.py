"""Timing of passes, prompts and generations on one loaded model.

Passes are those of the decode loop, greedy: of an AR pass the rows that follow the token drawn are
drawn, of a block all of them, with confidences and second choices. Figures are medians over
repetitions, after one repetition that does not count. Nothing is compared here: ratios belong to
runs on the same machine, and who reads them decides.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import Sampler, SamplingSettings

GREEDY = SamplingSettings(temperature=0)


@dataclass(frozen=True)
class Measurement:
    """One test: `rows` tokens or rows per repetition, and the seconds of each repetition."""

    test: str
    rows: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance from the fastest to the slowest repetition, relative to the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    @property
    def per_second(self) -> float:
        return self.rows / self.median

    @property
    def average(self) -> tuple[float, float]:
        """Mean and sample standard deviation of tokens per second, as llama-bench has them."""
        speeds = [self.rows / seconds for seconds in self.seconds]
        return statistics.mean(speeds), statistics.stdev(speeds) if len(speeds) > 1 else 0.0


@dataclass(frozen=True)
class BenchmarkSettings:
    """prompt, generate: tokens of the two speed tests (0 leaves one out). rows: row counts of the
    pass-time tests. depth: rows already in the cache. batch: prompt rows per pass.
    """

    prompt: int
    generate: int
    rows: tuple[int, ...]
    depth: int
    repetitions: int
    batch: int

    @property
    def context(self) -> int:
        return self.depth + max(self.prompt, self.generate, *self.rows, 1) + 1


def run_benchmark(model: Model, settings: BenchmarkSettings) -> Iterator[Measurement]:
    """Run the tests, yielding each result as it is there.

    Raises OrthrusError when the tests need more context than the model has.
    """
    if settings.context > model.config.n_ctx_train:
        raise OrthrusError(
            f"these tests need {settings.context} tokens of context, {model.config.name} has"
            f" {model.config.n_ctx_train}; lower -d, -p, -n or --rows"
        )
    cache: Any = model.new_cache(settings.context)
    tokens = _tokens(model, settings.context)
    depth, sampler = settings.depth, Sampler(GREEDY)

    def sequence(length: int) -> TokenSequence:
        return TokenSequence(model.config, cache, sampler, tokens[:length])

    def read(length: int) -> None:
        drive(model, prefill(sequence(length), batch=settings.batch))

    def rewind() -> None:
        cache.restore(cache.checkpoint(min(depth, cache.length)))
        if cache.length < depth:
            read(depth)

    def timed(test: str, rows: int, run: Callable[[], object]) -> Measurement:
        seconds = []
        for _ in range(settings.repetitions + 1):
            rewind()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return Measurement(test, rows, tuple(seconds[1:]))

    if settings.prompt:
        length = depth + settings.prompt
        yield timed(f"pp{settings.prompt}", settings.prompt, partial(read, length))
    if settings.generate:
        yield timed(
            f"tg{settings.generate}",
            settings.generate,
            lambda: _generate(model, sequence(depth + 1), settings.generate),
        )
    start = sequence(depth + 1)
    passes = {
        f"ar {n}": start.verify_segment(Tree(tuple(tokens[depth + 1 : depth + n])))
        for n in settings.rows
    }
    if model.config.has_heads:
        passes |= {f"diffusion {n}": start.block_segment(n) for n in settings.rows}
    if isinstance(model, ModelWithDrafter):
        start.draft_cache = model.new_draft_cache(settings.context)
        start.draft_cache.assume(depth)
        draft = start.drafter_segment(start.draft_cache.beside.width)
        passes[f"drafter {len(draft)}"] = draft
    for test, segment in passes.items():
        yield timed(test, len(segment), partial(model.forward, [segment]))


def _generate(model: Model, sequence: TokenSequence, n: int) -> None:
    for _ in decode(model, sequence, FixedPolicy(PLAIN, model.config), n):
        pass


def _tokens(model: Model, n: int) -> list[int]:
    """Arbitrary but reproducible ids."""
    ids = np.random.default_rng(0).integers(0, model.config.n_vocab, n)
    return [int(i) for i in ids]


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system won't say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
