"""What the runtime's passes and cycles cost on a GPU, for `gpu_check`.

Cycles are timed with a limit of zero tokens: nothing is committed, so that the same cycle can be
launched over and over at the same place. Speed does not depend on what the cache holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from orthrus_kernels.sampling.sample import SamplingParameters, sampling_parameters
from orthrus_kernels.tools.gpu_check import Figure, measure_copy

from orthrus_gguf.decode import prefill
from orthrus_gguf.drafting.policy import Plan, Strategy
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda import steps
from orthrus_gguf.runtime.cuda.buffers import pass_rows
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.decoding import decode_on_device
from orthrus_gguf.runtime.cuda.graphs import Graphs
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.stepper import Stepper
from orthrus_gguf.sampling import Sampler, SamplingSettings

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
CONTEXTS = (512, 4096, 32768)
GREEDY = SamplingSettings(temperature=0)
AR = Plan(Strategy.AR, 0)


@dataclass(frozen=True)
class Effort:
    """How much is measured: row counts, contexts, repetitions, tokens of a generation."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    repeats: int
    tokens: int
    prompt: int


FULL = Effort(ROWS, CONTEXTS, 20, 128, 512)
SMALL = Effort((1, 3), (40,), 1, 3, 70)


def figures(path: Path, device: str | None) -> Iterator[Figure]:
    """All figures of one file. On the CPU the same code runs once, and its numbers mean nothing."""
    effort = SMALL if device == "cpu" else FULL
    with ModelFile.open(path) as file:
        size = sum(info.n_bytes for info in file.tensors.values())
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with CudaModel.load(file, device=device) as model:
            seconds = time.perf_counter() - started
            name = model.config.name
            yield Figure(f"{name}: load", seconds, "s", f"{size / seconds / 1e9:.2f} GB/s")
            ceiling = measure_copy("cuda") if model.machine.is_cuda else math.inf
            yield from _generation(model, name, effort, ceiling)
            yield from _prompt(model, name, effort)
            for context in effort.contexts:
                if _fits(model, context):
                    yield from _at_context(model, name, context, effort, ceiling)
            yield from _memory(model, name)


def _fits(model: CudaModel, context: int) -> bool:
    free = model.machine.free_bytes()
    return free is None or (context + 128) * model.memory.cache_row < 0.8 * free


def _generation(model: CudaModel, name: str, effort: Effort, ceiling: float) -> Iterator[Figure]:
    """AR tokens per second as a user gets them, host included."""
    prompt = [7] * effort.prompt
    cache = model.new_cache(effort.prompt + 2 * effort.tokens + 8)
    tokens = [*prompt, Sampler(GREEDY).sample(prefill(model, cache, prompt), prompt)]
    began = time.perf_counter()
    list(decode_on_device(model, cache, GREEDY, tokens, AR, 3))  # compiles, then captures
    yield Figure(f"{name}: first three AR steps", time.perf_counter() - began, "s", "compiling")
    began = time.perf_counter()
    list(decode_on_device(model, cache, GREEDY, tokens, AR, effort.tokens))
    speed = effort.tokens / (time.perf_counter() - began)
    moved = model.runner.weights.ar_pass_bytes * speed
    note = f"{moved / 1e9:.0f} GB/s of weights, {moved / ceiling:.0%} of the copy ceiling"
    yield Figure(f"{name}: AR generation", speed, "tokens/s", note)


def _prompt(model: CudaModel, name: str, effort: Effort) -> Iterator[Figure]:
    """The two ways to process a prompt: dense products, and fused passes of 64 rows."""
    prompt = [7] * effort.prompt
    for label, batch in (("dense", effort.prompt), ("fused, 64 rows", 64)):
        cache = model.new_cache(effort.prompt)

        def run(cache: CudaCache = cache, batch: int = batch) -> None:
            cache.truncate(0)
            prefill(model, cache, prompt, batch=batch)

        run()
        began = time.perf_counter()
        for _ in range(effort.repeats):
            run()
        seconds = (time.perf_counter() - began) / effort.repeats
        yield Figure(f"{name}: prompt of {effort.prompt}, {label}", effort.prompt / seconds,
                     "tokens/s")  # fmt: skip


def _at_context(
    model: CudaModel, name: str, context: int, effort: Effort, ceiling: float
) -> Iterator[Figure]:
    """Passes of 1 .. 64 rows, then the cycles of every strategy."""
    label = f"{name} at {context}"
    cache = model.new_cache(context + 2 * pass_rows(model.config))
    with model.machine.running():
        for keys, values in cache.layers:  # no stray NaN in what attention reads
            for planes in (keys, values):
                planes.values.zero_()
                planes.scales.zero_()
    cache.append(context)
    one = 0.0
    for rows in effort.rows:
        ms = _pass_time(model, cache, context, rows, effort.repeats)
        one = one or ms
        share = model.runner.weights.ar_pass_bytes / ms * 1e3 / ceiling
        note = f"{ms / one:.2f} of one row, weights at {share:.0%} of the copy ceiling"
        yield Figure(f"{label}: pass of {rows} rows", ms, "ms", note)
    block = model.config.block_size
    plans = [("AR cycle", AR)]
    if block is not None:
        plans += [
            ("two-pass cycle", Plan(Strategy.TWO_PASS, block - 1)),
            ("fused cycle, 1 block", Plan(Strategy.FUSED, block - 2, 1)),
            ("fused cycle, half width, 2 blocks", Plan(Strategy.FUSED, max(1, block // 2 - 2), 2)),
        ]
        ms = _draft_time(model, cache, context, block, effort.repeats)
        yield Figure(f"{label}: draft pass of {block} rows", ms, "ms", f"{ms / one:.2f} of one row")
    for title, plan in plans:
        ms, busy = _cycle_time(model, cache, context, plan, effort.repeats)
        note = f"{ms / one:.2f} of a pass of one row"
        if busy is not None:
            note += f", outside kernels {1 - busy / ms:.1%}"
        yield Figure(f"{label}: {title}", ms, "ms", note)


def _pass_time(model: CudaModel, cache: CudaCache, context: int, rows: int, repeats: int) -> float:
    """Milliseconds of a verify pass, its commit included, as a graph."""
    with model.machine.running():
        d = _idle(model, cache, context)
        steps.set_tables(d, 1, rows - 1)
        step = partial(steps.verify_step, d, _greedy(model), rows)
        return _graph_time(model, step, repeats)


def _draft_time(model: CudaModel, cache: CudaCache, context: int, rows: int, repeats: int) -> float:
    with model.machine.running():
        d = _idle(model, cache, context)
        steps.set_tables(d, rows, 0)
        return _graph_time(model, partial(steps.draft_step, d, _greedy(model), rows), repeats)


def _idle(model: CudaModel, cache: CudaCache, context: int) -> steps.Decoding:
    """A decoding that may commit nothing, its anchor at `context`."""
    d = steps.new_decoding(model.runner, cache)
    steps.set_position(d, context, 0, 0)
    return d


def _greedy(model: CudaModel) -> SamplingParameters:
    device = model.machine.device
    return sampling_parameters(model.config.n_vocab, device, temperature=0.0)


def _graph_time(model: CudaModel, step: Callable[[], None], repeats: int) -> float:
    graphs = Graphs(model.machine)
    for _ in range(3):  # compile, capture, warm up
        graphs.run("step", step)
    return _elapsed(model, lambda: graphs.run("step", step), repeats)


def _elapsed(model: CudaModel, launch: Callable[[], None], repeats: int) -> float:
    """Milliseconds per launch, launched back to back."""
    if not model.machine.is_cuda:
        launch()
        return 1.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def _cycle_time(
    model: CudaModel, cache: CudaCache, context: int, plan: Plan, repeats: int
) -> tuple[float, float | None]:
    """Milliseconds per cycle of a stepper that runs ahead, and those spent inside kernels."""
    stepper = Stepper(model, cache)
    cache.truncate(context)
    stepper.begin([0] * (context + 1), GREEDY, 0)

    def cycle() -> None:
        stepper.launch(plan)
        if stepper.in_flight > 1:
            stepper.collect()

    for _ in range(4):
        cycle()
    with model.machine.running():
        ms = _elapsed(model, cycle, repeats)
        busy = None
        if model.machine.is_cuda:
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(repeats):
                    cycle()
                torch.cuda.synchronize()
            total = sum(item.self_device_time_total for item in profile.key_averages())
            busy = total / 1e3 / repeats
    stepper.rewind(context)
    return ms, busy


def _memory(model: CudaModel, name: str) -> Iterator[Figure]:
    """What was allocated at most, beside what the plan says about weights and buffers."""
    plan = model.memory
    planned = plan.weights + plan.heads + plan.work
    peak = torch.cuda.max_memory_allocated() if model.machine.is_cuda else planned
    note = f"plan without caches {planned / 1e9:.2f} GB"
    yield Figure(f"{name}: peak memory, largest cache included", peak / 1e9, "GB", note)
