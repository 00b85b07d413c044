"""The kernels that a model needs, compiled before they are: in parallel, while weights load.

    python -m orthrus_gguf.runtime.cuda.compile_ahead MODEL.gguf --capability 86

is what `CudaModel.load` starts. It runs every kind of pass on tensors without numbers, with a
launcher that only notes what it would compile (`orthrus_kernels.tools.launches`), compiles that in
several processes, and leaves it in triton's cache, where the launches will find it. It needs no
GPU; --report prints what each kernel uses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from orthrus_kernels.tools.launches import Launch, recorded
from orthrus_kernels.tools.offline import Compiled, summary_line
from torch import Tensor

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile, open_beside
from orthrus_gguf.model.tensors import FEATURES
from orthrus_gguf.model.window import Window
from orthrus_gguf.runtime.cuda.beside import CudaBeside
from orthrus_gguf.runtime.cuda.buffers import new_buffers, pass_rows
from orthrus_gguf.runtime.cuda.device import Machine
from orthrus_gguf.runtime.cuda.drafter import CudaNetwork
from orthrus_gguf.runtime.cuda.drafter_weights import empty_drafter, plan_drafter
from orthrus_gguf.runtime.cuda.kernels import TRITON
from orthrus_gguf.runtime.cuda.memory_plan import META, empty_weights, plan_memory
from orthrus_gguf.runtime.cuda.model import PROMPT_ROWS, CudaModel
from orthrus_gguf.runtime.cuda.mtp import CudaBlock
from orthrus_gguf.runtime.cuda.passes import BUCKETS
from orthrus_gguf.runtime.cuda.runner import PassRunner
from orthrus_gguf.runtime.cuda.weight_plan import plan_weights
from orthrus_gguf.runtime.mtp import Chain, MtpCache
from orthrus_gguf.runtime.protocol import Draw, Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

#: Cache rows that the passes see; kernels are the same at any.
CONTEXT = 300


class EmptyMachine(Machine):
    """A card whose tensors have no numbers."""

    def download(self, found: Tensor, buffer: Tensor) -> NDArray[Any]:
        """Zeros."""
        return buffer.zero_().numpy()


def empty_model(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    machine: Machine,
    cache_types: tuple[str, str] = ("f16", "f16"),
    prompt_rows: int = PROMPT_ROWS,
) -> CudaModel:
    """A model without numbers, on the meta device."""
    plan = plan_weights(config, tensors, machine.capability)
    runner = PassRunner(
        config,
        machine,
        empty_weights(config, tensors, plan),
        new_buffers(config, plan, META),
        torch.empty(config.rotary_dim // 2, dtype=torch.float64, device=META),
        1.0,
        torch.empty(256, dtype=torch.uint8, device=META),
        cache_types,
    )
    memory = plan_memory(config, tensors, plan, 1, *cache_types, prompt_rows)
    return CudaModel(runner, prompt_rows, memory, None, plan)


def empty_network(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    target: CudaModel,
    window: Window | None = None,
) -> CudaNetwork:
    """A DFlash drafter's network without numbers, beside a model without."""
    capability = target.machine.capability
    plan = plan_drafter(config, tensors, target.plan, capability, window=window)
    weights = empty_drafter(plan, target.runner.weights, META)
    taps = tensors[FEATURES].shape[1] // config.n_embd
    return CudaNetwork(plan, weights, tuple(range(taps)), target, None)


def empty_block(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], target: CudaModel, ids: int | None
) -> CudaBlock:
    """An MTP block without numbers, beside a model without. ids: see `MtpFile.cut`."""
    plan = plan_drafter(config, tensors, target.plan, target.machine.capability, ids)
    weights = empty_drafter(plan, target.runner.weights, META)
    return CudaBlock(plan, weights, (target.config.n_layers + 1,), target, None)


def needed_launches(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    capability: int,
    cache_types: tuple[str, str] = ("f16", "f16"),
    tuned: Mapping[str, Any] | None = None,
    prompt_rows: int = PROMPT_ROWS,
    drafter: tuple[ModelConfig, Mapping[str, TensorInfo]] | None = None,
    ids: int | None = None,
    window: Window | None = None,
) -> list[Launch]:
    """What passes of a model launch on a card of this compute capability, each kernel once.
    drafter: config and tensors of one beside it. ids: see `MtpFile.cut`. window: of the drafter."""
    config, tensors = one_layer_of_each(config, tensors)
    machine = EmptyMachine(META, "no card", capability, TRITON, tuned or {}, None, False)
    with recorded(capability) as found:
        model = empty_model(config, tensors, machine, cache_types, prompt_rows)
        for segments in usual_passes(model, prompt_rows):
            model.forward(segments)
        if drafter is not None:
            # Layers with a window and without differ in what they launch, too.
            config, tensors = drafter if window else one_layer_of_each(*drafter)
            if FEATURES in tensors:
                network = empty_network(config, tensors, model, window)
                for segments in (*learning_passes(network), *block_passes(network)):
                    network.forward(segments)
            else:
                block = empty_block(config, tensors, model, ids)
                for segments in learning_passes(block):
                    block.forward(segments)
                for chains in usual_chains(block):
                    block.draft(chains)
    return found


def learning_passes(network: CudaBeside) -> Iterator[list[Segment]]:
    """Rows to learn of, in every size."""
    cache = network.new_cache(CONTEXT + pass_rows(network.config))
    cache.assume(CONTEXT)
    for count in BUCKETS:
        yield [ar_segment(cache, [0] * count, CONTEXT, wanted=range(0))]


def usual_chains(block: CudaBlock) -> Iterator[list[Chain]]:
    """Chains of one to many sequences; more steps launch nothing else."""
    caches = [
        MtpCache(block.new_rows(CONTEXT + 2), block.config.n_embd) for _ in range(BUCKETS[-1])
    ]
    for cache in caches:
        cache.assume(CONTEXT)
    for settings in (SamplingSettings(temperature=0), SamplingSettings()):
        draw = Draw(Sampler(settings), [0] * (CONTEXT + 1), detail=True)
        for count in BUCKETS:
            segments = [diffusion_segment(c, 0, 0, 2, CONTEXT, draw=draw) for c in caches[:count]]
            yield [Chain(segment) for segment in segments]


def block_passes(network: CudaNetwork) -> Iterator[list[Segment]]:
    """Blocks, which are always whole."""
    config = network.config
    cache = network.new_cache(CONTEXT + pass_rows(config))
    cache.assume(CONTEXT)
    rows, history = config.block_size or 0, [0] * (CONTEXT + 1)
    for settings in (SamplingSettings(temperature=0), SamplingSettings()):
        draw = Draw(Sampler(settings), history, detail=True)
        for wanted in {1, 2, 4, 8, 16, 24, 32, 48, rows - 1} - {rows}:
            if wanted < rows:
                yield [
                    diffusion_segment(
                        cache, 0, config.mask_token or 0, rows, CONTEXT,
                        wanted=range(1, wanted + 1), draw=draw,
                    )
                ]  # fmt: skip


def one_layer_of_each(
    config: ModelConfig, tensors: Mapping[str, TensorInfo]
) -> tuple[ModelConfig, dict[str, TensorInfo]]:
    """The model with one layer for each mix of types that its layers have; of a hybrid, with as
    many layers in a row as it takes until their kinds repeat themselves."""
    period = 1 if config.hybrid is None else config.hybrid.attention_every
    layers: dict[int, dict[str, TensorInfo]] = {}
    rest: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name.startswith("blk."):
            _, number, part = name.split(".", 2)
            layers.setdefault(int(number), {})[part] = info
        else:
            rest[name] = info
    found = [layers[index] for index in range(config.n_layers)]
    runs = [found[first : first + period] for first in range(0, config.n_layers, period)]
    whole: dict[object, list[dict[str, TensorInfo]]] = {}
    for run in runs:
        types = [sorted((part, info.type) for part, info in parts.items()) for parts in run]
        whole.setdefault(str(types), run)
    # What ends before its kinds repeat stands last.
    chosen = [parts for run in sorted(whole.values(), key=len, reverse=True) for parts in run]
    for place, parts in enumerate(chosen):
        rest |= {f"blk.{place}.{part}": info for part, info in parts.items()}
    return replace(config, n_layers=len(chosen)), rest


def usual_passes(model: CudaModel, prompt_rows: int) -> Iterator[list[Segment]]:
    """Passes of every size and kind that strategies ask for, drawn as `orthrus-run` draws: plain
    and sampled rows, drafts, verification with blocks, trees, two sequences, prompts."""
    config, most = model.config, pass_rows(model.config)
    history = [0] * (CONTEXT + 1)
    a, b = (model.new_cache(CONTEXT + prompt_rows + most) for _ in range(2))
    for cache in (a, b):
        cache.assume(CONTEXT)
    for settings in (SamplingSettings(temperature=0), SamplingSettings()):
        sampler = Sampler(settings)
        plain, detail = Draw(sampler, history), Draw(sampler, history, detail=True)

        def rows(
            count: int, cache: Any = a, draw: Draw = plain, parents: Sequence[int] | None = None
        ) -> Segment:
            return ar_segment(cache, [0] * count, CONTEXT, draw=draw, parents=parents)

        for count in BUCKETS:
            yield [rows(count)]
            yield [rows(count, draw=detail)]
        yield [rows(6, parents=(-1, 0, 0, 1, 2, 2))]
        yield [rows(1), rows(3, b)]
        for count in (65, prompt_rows):
            wanted = range(count - 1, count)
            yield [ar_segment(a, [0] * count, CONTEXT, wanted=wanted, draw=plain)]
        if not config.has_heads or config.mask_token is None:
            continue
        for width in BUCKETS:
            if width > (config.block_size or 0):
                break
            for count in (0, *BUCKETS):
                if width + count <= most:
                    block = diffusion_segment(
                        a, 0, config.mask_token, width, CONTEXT + count, draw=detail
                    )
                    yield [rows(count), block] if count else [block]


def compile_launch(launch: Launch) -> tuple[str, str | None]:
    """Its line for --report, and what went wrong."""
    try:
        handle = launch.compile()
    except Exception as error:  # triton's errors have no base class of their own
        return launch.name, f"{launch.name}: {type(error).__name__}: {str(error).splitlines()[0]}"
    if not _WANTS_REPORT:
        return launch.name, None
    used = Compiled(handle, launch.options["num_warps"]).report()
    return summary_line(launch.name, launch.capability, used), None


_LAUNCHES: list[Launch] = []
_WANTS_REPORT = False


def _compile_number(number: int) -> tuple[str, str | None]:
    return compile_launch(_LAUNCHES[number])


def compile_all(launches: Sequence[Launch], jobs: int) -> Iterator[tuple[str, str | None]]:
    """`compile_launch` of all, the dearest first, in processes forked from this one."""
    _LAUNCHES[:] = sorted(launches, key=lambda launch: "a8" not in launch.name)
    with multiprocessing.get_context("fork").Pool(max(1, min(jobs, len(launches)))) as pool:
        yield from pool.imap_unordered(_compile_number, range(len(launches)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; a line `done of all` per kernel; exit code 1 if one does not compile."""
    global _WANTS_REPORT
    parser = argparse.ArgumentParser(prog="python -m orthrus_gguf.runtime.cuda.compile_ahead")
    parser.add_argument("files", nargs="+", type=Path, help="a model, or a base and its heads")
    parser.add_argument("--drafter", type=Path, help="one beside it")
    parser.add_argument("--mtp", action="store_true", help="the block in its own file")
    parser.add_argument("--draft-ids", type=int, help="of the MTP block's drafts")
    parser.add_argument("--capability", type=int, required=True, help="86 = sm_86")
    parser.add_argument("--card", default="", help="name of the card, for its tuned tiles")
    parser.add_argument("--cache-types", nargs=2, default=("f16", "f16"))
    parser.add_argument("--prompt-rows", type=int, default=PROMPT_ROWS)
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)))
    parser.add_argument("--report", action="store_true", help="print what each kernel uses")
    options = parser.parse_args(arguments)
    _WANTS_REPORT = options.report
    from orthrus_kernels.products.dispatch import load_table

    began = time.perf_counter()
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(*options.files))
        drafter = window = None
        if options.drafter is not None or options.mtp:
            beside = MtpFile.inside(file) if options.mtp else open_beside(options.drafter, file)
            stack.callback(beside.close)
            drafter = beside.config, beside.tensors
            window = None if isinstance(beside, MtpFile) else beside.window
        launches = needed_launches(
            file.config,
            file.tensors,
            options.capability,
            tuple(options.cache_types),
            load_table(options.card),
            options.prompt_rows,
            drafter,
            options.draft_ids,
            window,
        )
    failures, parent = 0, os.getppid()
    for done, (line, problem) in enumerate(compile_all(launches, options.jobs), 1):
        if os.getppid() != parent:  # whoever loaded the model is gone
            return 1
        failures += problem is not None
        if problem is not None:
            print(problem, file=sys.stderr, flush=True)
        print(f"{done} of {len(launches)} {line}", flush=True)
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
