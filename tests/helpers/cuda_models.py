"""The CUDA runtime on the CPU, for tests: its kernels replaced by their plain references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orthrus_kernels.products.plain
import pytest
from orthrus_kernels.attention import kv_cache
from orthrus_kernels.packing.quant_tensor import QuantTensor
from orthrus_kernels.recurrence import states
from torch import Tensor

from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda import cache
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import Model, ar_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings


@contextmanager
def remembered_weights() -> Iterator[None]:
    """Stand-ins dequantize a matrix at its first use only, which makes them ten times faster."""
    dequantize = orthrus_kernels.products.plain.dequantize
    known: dict[int, tuple[QuantTensor, Tensor]] = {}

    def remembered(weight: QuantTensor) -> Tensor:
        if id(weight) not in known:  # the tensor is kept, so that its id stays its own
            known[id(weight)] = weight, dequantize(weight).double()
        return known[id(weight)][1]

    orthrus_kernels.products.plain.dequantize = remembered
    try:
        yield
    finally:
        orthrus_kernels.products.plain.dequantize = dequantize


@contextmanager
def stand_in(path: Path, **settings: Any) -> Iterator[CudaModel]:
    """The model of a file on the stand-ins."""
    with (
        remembered_weights(),
        ModelFile.open(path) as file,
        CudaModel.load(file, **{"device": "cpu", **settings}) as model,
    ):
        yield model


@contextmanager
def small_heads() -> Iterator[None]:
    """Let the runtime take heads of tests' hybrids, which are smaller than those of any kernel;
    stand-ins need none."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (kv_cache, cache):
            patch.setattr(module, "HEAD_DIMS", (32, *kv_cache.HEAD_DIMS))
        patch.setattr(cache, "STATE_DIMS", (16, *states.STATE_DIMS))
        yield


class FakeGraphs:
    """Stands for CUDA graphs: a replay runs what was recorded, and nothing newer.

    A step that looks at anything but its key and static memory thus gives wrong results.
    recorded: how many graphs there are. replays: of all of them.
    """

    def __init__(self) -> None:
        self.recorded = 0
        self.replays = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def filled(model: CudaModel, tokens: Sequence[int], capacity: int) -> CudaCache:
    """A cache that holds `tokens`."""
    cache = model.new_cache(capacity)
    model.logits([ar_segment(cache, tokens, 0, wanted=range(0))])
    cache.commit(range(len(tokens)))
    return cache


def generate(
    model: Model,
    prompt: Sequence[int],
    settings: SamplingSettings,
    plan: str,
    n: int,
    *,
    cache: CudaCache | None = None,
) -> tuple[list[int], list[Cycle]]:
    """`n` tokens after the prompt, and the cycles that found them."""
    cache = model.new_cache(len(prompt) + n) if cache is None else cache
    sequence = TokenSequence(model.config, cache, Sampler(settings), list(prompt))
    drive(model, prefill(sequence))
    cycles = list(decode(model, sequence, FixedPolicy(parse(plan), model.config), n - 1))
    assert cache.length == len(sequence.tokens) - 1
    return sequence.tokens[len(prompt) :], cycles


DemoFile = Callable[..., Path]
