"""What the runtime's passes cost on a GPU.

Passes run again and again at the same place, as graphs, and nothing is committed. Speed does not
depend on what the cache holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from orthrus_kernels.attention import attention
from orthrus_kernels.tools.gpu_check_report import Figure, measure_copy

from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import Draw, Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
CONTEXTS = (512, 4096, 32768)

#: Kernels of a pass that are told apart, the dearest first.
PROFILED = 16
GREEDY = SamplingSettings(temperature=0)


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


def figures(path: Path, device: str | None, contexts: Sequence[int] | None) -> Iterator[Figure]:
    """Figures of one file. contexts: what passes are timed at; None: loading, generation and
    prompts are measured, and passes at the shortest. On the CPU the same code runs once, and its
    numbers mean nothing."""
    effort = SMALL if device == "cpu" else FULL
    with ModelFile.open(path) as file:
        size = sum(info.n_bytes for info in file.tensors.values())
        started = time.perf_counter()
        with CudaModel.load(file, device=device, say=print) as model:
            seconds = time.perf_counter() - started
            name = model.config.name
            yield Figure(f"{name}: load", seconds, "s", f"{size / seconds / 1e9:.2f} GB/s")
            where = str(model.machine.device)
            ceiling = measure_copy(where) if model.machine.is_cuda else math.inf
            if contexts is None:
                yield from _generation(model, name, effort, ceiling)
                contexts = effort.contexts[:1]
                yield from _at_context(model, name, contexts[0], effort, ceiling)
                yield from _prompt(model, name, effort)
                yield from _memory(model, name)
                return
            for context in contexts if device != "cpu" else effort.contexts:
                if _fits(model, context):
                    yield from _at_context(model, name, context, effort, ceiling)


def profile(path: Path, device: str | None) -> Iterator[Figure]:
    """One AR pass at 512 by kernel: what each takes in all layers, and what lies between them."""
    effort = SMALL if device == "cpu" else FULL
    with ModelFile.open(path) as file, CudaModel.load(file, device=device, say=print) as model:
        segment, is_cuda = _ar_rows(model, effort.contexts[0], 1), model.machine.is_cuda
        milliseconds, _ = _timed(model, [segment], effort)
        kinds = torch.profiler.ProfilerActivity
        with (
            model.machine.running(),
            torch.profiler.profile(activities=[kinds.CUDA if is_cuda else kinds.CPU]) as found,
        ):
            launch = model.launch_again([segment])
            for _ in range(effort.repeats):
                launch()
            if is_cuda:
                torch.cuda.synchronize(model.machine.device)
        events = sorted(found.key_averages(), key=lambda event: -_micros(event, is_cuda))
        total = sum(_micros(event, is_cuda) for event in events) / effort.repeats
        for event in events[:PROFILED]:
            note = f"{event.count / effort.repeats:.0f} launches"
            micros = _micros(event, is_cuda) / effort.repeats
            yield Figure(f"AR pass: {event.key[:60]}", micros, "us", note)
        note = f"of {1e3 * milliseconds:.0f} us; all kernels together {total:.0f} us"
        yield Figure("AR pass: gaps between kernels", 1e3 * milliseconds - total, "us", note)


def _micros(event: Any, is_cuda: bool) -> float:
    return float(event.self_device_time_total if is_cuda else event.self_cpu_time_total)


def chunk_trial(path: Path, device: str | None) -> Iterator[Figure]:
    """AR passes with other chunks of attention: another kernel, and other bits."""
    effort, usual = SMALL if device == "cpu" else FULL, attention.CHUNK
    try:
        for chunk in (usual, 4 * usual):
            attention.CHUNK = chunk
            with ModelFile.open(path) as file, CudaModel.load(file, device=device) as model:
                for context in effort.contexts[:2]:
                    if _fits(model, context):
                        ms, _ = _timed(model, [_ar_rows(model, context, 1)], effort)
                        yield Figure(f"AR pass at {context}, chunks of {chunk}", ms, "ms")
    finally:
        attention.CHUNK = usual


def _ar_rows(model: CudaModel, context: int, rows: int) -> Segment:
    """Rows of a sequence that holds `context` tokens."""
    draw = Draw(Sampler(GREEDY), [0] * (context + 1))
    return ar_segment(_held(model, context), [0] * rows, context, draw=draw)


def _fits(model: CudaModel, context: int) -> bool:
    free = model.machine.free_bytes()
    return free is None or (context + 128) * model.memory.cache_row < 0.8 * free


def _sequence(model: CudaModel, cache: CudaCache, tokens: Sequence[int]) -> TokenSequence:
    return TokenSequence(model.config, cache, Sampler(GREEDY), list(tokens))


def _generation(model: CudaModel, name: str, effort: Effort, ceiling: float) -> Iterator[Figure]:
    """AR tokens per second as a user gets them, host included."""
    cache = model.new_cache(effort.prompt + 2 * effort.tokens + 8)
    sequence = _sequence(model, cache, [7] * effort.prompt)
    drive(model, prefill(sequence))
    policy = FixedPolicy(PLAIN, model.config)
    began = time.perf_counter()
    list(decode(model, sequence, policy, 3))  # compiles, then captures
    yield Figure(f"{name}: first three AR passes", time.perf_counter() - began, "s", "compiling")
    began = time.perf_counter()
    list(decode(model, sequence, policy, effort.tokens))
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
            cache.restore(cache.checkpoint(0))
            drive(model, prefill(_sequence(model, cache, prompt), batch=batch))

        run()
        began = time.perf_counter()
        for _ in range(effort.repeats):
            run()
        seconds = (time.perf_counter() - began) / effort.repeats
        yield Figure(
            f"{name}: prompt of {effort.prompt}, {label}", effort.prompt / seconds, "tokens/s"
        )


def _at_context(
    model: CudaModel, name: str, context: int, effort: Effort, ceiling: float
) -> Iterator[Figure]:
    """Passes of 1 .. 64 rows, a draft pass, a verify pass with blocks, a tree; by graph."""
    label = f"{name} at {context}"
    cache = _held(model, context)
    draw = Draw(Sampler(GREEDY), [0] * (context + 1))
    one = 0.0
    for rows in effort.rows:
        segment = ar_segment(cache, [0] * rows, context, draw=draw)
        ms, call = _timed(model, [segment], effort)
        one = one or ms
        share = model.runner.weights.ar_pass_bytes / ms * 1e3 / ceiling
        note = f"{ms / one:.2f} of one row, weights at {share:.0%} of the copy ceiling, {call}"
        yield Figure(f"{label}: pass of {rows} rows", ms, "ms", note)
    parents = [-1, 0, 0, 1, 1, 2, 3, 4]
    tree = ar_segment(cache, [0] * 8, context, parents=parents, draw=draw)
    passes = {"tree of 8 rows": [tree]}
    if _fits(model, 4 * context):
        caches = [cache, *(_held(model, context) for _ in range(3))]
        passes["four sequences of one row"] = [
            ar_segment(other, [0], context, draw=draw) for other in caches
        ]
    block, mask = model.config.block_size, model.config.mask_token
    if block is not None and mask is not None:
        detail = Draw(draw.sampler, draw.history, detail=True)
        half = max(block // 2, 1)
        verify = ar_segment(cache, [0] * half, context, draw=draw)
        passes |= {
            f"draft pass of {block} rows": [
                diffusion_segment(cache, 0, mask, block, context, draw=detail)
            ],
            f"verify pass of {half} rows with two blocks of {half}": [
                verify,
                *(diffusion_segment(cache, 0, mask, half, context, draw=detail) for _ in "12"),
            ],
        }
    for title, segments in passes.items():
        ms, call = _timed(model, segments, effort)
        yield Figure(f"{label}: {title}", ms, "ms", f"{ms / one:.2f} of one row, {call}")


def _held(model: CudaModel, context: int) -> CudaCache:
    """A cache that holds `context` rows of zeros: no stray NaN in what attention reads."""
    cache = model.new_cache(context + 128)
    with model.machine.running():
        for planes in cache.planes or ():
            planes.values.zero_()
            planes.scales.zero_()
    cache.assume(context)
    return cache


def _timed(model: CudaModel, segments: list[Segment], effort: Effort) -> tuple[float, str]:
    """Milliseconds of one pass, launched back to back; and what a call of `forward` takes, tables
    and choices included, as a note."""
    for _ in range(3):  # compile, capture, warm up
        model.forward(segments)
    began = time.perf_counter()
    for _ in range(effort.repeats):
        model.forward(segments)
    call = (time.perf_counter() - began) / effort.repeats * 1e3
    with model.machine.running():
        return _elapsed(model, model.launch_again(segments), effort), f"{call:.2f} ms a call"


def _elapsed(model: CudaModel, launch: Callable[[], None], effort: Effort) -> float:
    """Milliseconds per launch, by the device's clock."""
    if not model.machine.is_cuda:
        launch()
        return 1.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(effort.repeats):
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / effort.repeats


def _memory(model: CudaModel, name: str) -> Iterator[Figure]:
    """What was allocated at most, beside what the plan says about weights and buffers."""
    plan = model.memory
    planned = plan.weights + plan.heads + plan.work
    peak = planned
    if model.machine.is_cuda:
        peak = torch.cuda.max_memory_allocated(model.machine.device)
    note = f"plan without caches {planned / 1e9:.2f} GB"
    yield Figure(f"{name}: peak memory, largest cache included", peak / 1e9, "GB", note)
