"""Launches of a pass, as predicted, against those of the runtime: Triton's wrappers run on tensors
without numbers, with a launcher that only counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from synthetic_model import planned_tensors
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from orthrus_gguf.bench.prediction.cards import CARDS
from orthrus_gguf.bench.prediction.passes import PredictedCurve
from orthrus_gguf.bench.prediction.shapes import pass_shape
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.shapes import HYBRID_SHAPES, SHAPES
from orthrus_gguf.runtime.cuda.compile_ahead import EmptyMachine, empty_model
from orthrus_gguf.runtime.cuda.kernels import TRITON
from orthrus_gguf.runtime.cuda.memory_plan import META
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import Draw, Segment, View, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

CONTEXT = 100
DRAW = Draw(Sampler(SamplingSettings(temperature=0)), [0] * (CONTEXT + 1), detail=True)

#: Eight layers have both kinds, and all mixes of types.
LAYERS = 8


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    names: Counter[str] = Counter()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names[kernel.fn.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(InterpretedFunction, "run", launch)
    return names


def cut(config: ModelConfig) -> ModelConfig:
    return replace(config, n_layers=LAYERS)


def predicted(card: str, config: ModelConfig, file_type: str, views: Sequence[View]) -> int:
    return PredictedCurve(CARDS[card], config, file_type)._shape.launches(views)


def empty(card: str, config: ModelConfig, file_type: str) -> CudaModel:
    machine = EmptyMachine(META, "none", CARDS[card].capability, TRITON, {}, None, False)
    return empty_model(config, planned_tensors(config, file_type), machine)


def run(model: CudaModel, launched: Counter[str], rows: int, *, block: bool) -> int:
    cache = model.new_cache(CONTEXT + 64)
    cache.assume(CONTEXT)
    segments: list[Segment] = [ar_segment(cache, [0] * rows, CONTEXT, draw=DRAW)]
    if block:
        segments.append(diffusion_segment(cache, 0, 1, 16, CONTEXT, draw=DRAW))
    launched.clear()
    model.forward(segments)
    return launched.total()


@pytest.mark.parametrize("card", ["rtx-3090", "h200"])
@pytest.mark.parametrize("name", ["qwen3.6-27b-mtp", "qwen3.5-9b"])
def test_of_a_hybrid(launched: Counter[str], name: str, card: str) -> None:
    """The same for one row and for many. In half of the layers of a Q4_K_M file, a GeForce card
    multiplies the inputs of a DeltaNet in two products."""
    config = cut(HYBRID_SHAPES[name])
    for file_type in ("q4_k_m", "q8_0"):
        model = empty(card, config, file_type)
        found = {run(model, launched, rows, block=False) for rows in (1, 8, 33)}
        assert found == {predicted(card, config, file_type, [View.AR])}
        assert launched["_recur"] == 6
    usual = pass_shape(config, "q8_0", ()).launches([View.AR])
    assert usual == 9 * LAYERS + 5
    mixed = predicted(card, config, "q4_k_m", [View.AR]) - usual
    assert (mixed > 0) is (card == "rtx-3090")


def test_of_both_views(launched: Counter[str]) -> None:
    config = cut(SHAPES["qwen3-8b"])
    model = empty("rtx-3090", config, "q4_k_m")
    for block, views in ((False, [View.AR]), (True, [*View])):
        found = run(model, launched, 7, block=block)
        assert found == predicted("rtx-3090", config, "q4_k_m", views)
