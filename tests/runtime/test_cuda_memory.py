"""The CUDA runtime's memory plan, against what is really allocated and what files really hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from cuda_models import stand_in
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from synthetic_model import model_shape, qwen3_0_6b

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.architectures import QWEN2
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.tensors import base_tensors, diffusion_tensors
from orthrus_gguf.runtime.cuda import model as model_module
from orthrus_gguf.runtime.cuda.buffers import new_buffers, pass_rows
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.memory_plan import (
    GIB,
    META,
    MemoryPlan,
    allocated,
    cache_sizes,
    check_memory,
    empty_weights,
    plan_memory,
    tensors_in,
)
from orthrus_gguf.runtime.cuda.prompt_pass import new_prompt_buffers
from orthrus_gguf.runtime.cuda.weight_plan import plan_weights

DemoFile = Callable[..., Path]


@pytest.mark.parametrize(
    ("kind", "capability"), [("f16", 80), ("q8_0", 86), ("q4_k_m", 86), ("f32", 80)]
)
def test_plan_and_reality(demo_file: DemoFile, kind: str, capability: int) -> None:
    """What was planned on tensors without numbers is what loading and passes allocate."""
    with (
        stand_in(demo_file(kind), capability=capability) as model,
        ModelFile.open(demo_file(kind)) as file,
    ):
        config, runner, device = model.config, model.runner, torch.device("cpu")
        plan = plan_weights(config, file.tensors, capability)
        assert model.memory.weights + model.memory.heads == allocated(runner.weights)
        assert allocated(runner.weights) == runner.weights.nbytes
        sizes = [
            [(tensor.shape, tensor.dtype) for tensor in tensors_in(thing)]
            for thing in (runner.weights, empty_weights(config, file.tensors, plan))
        ]
        assert sizes[0] == sizes[1]
        assert allocated(new_buffers(config, plan, META)) == allocated(runner.buffers)
        prompt = [
            allocated(new_prompt_buffers(config, runner.weights, 70, where))
            for where in (device, META)
        ]
        assert prompt[0] == prompt[1]
        for type_k, type_v in (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0")):
            anchor, spare = torch.zeros(64, dtype=torch.uint8), pass_rows(config)
            cache = CudaCache(config, type_k, type_v, 77, anchor, spare)
            row, rest = cache_sizes(config, type_k, type_v)
            assert allocated(cache.planes) == 77 * row + rest


def test_heads_and_file_sizes(demo_file: DemoFile) -> None:
    """The demo file in F16: weights take what the file holds, but for the embedding, which is
    packed a second time as the head, and for norms of F16 files, which are F32 anyway."""
    path = demo_file("f16")
    with stand_in(path) as model, ModelFile.open(path) as file:
        matrices = [info for info in file.tensors.values() if len(info.shape) == 2]
        heads = sum(info.n_bytes for info in matrices if "_diff" in info.name)
        assert model.memory.heads == heads
        embedding = file.tensors["token_embd.weight"].n_bytes
        norms = sum(info.n_bytes for info in file.tensors.values() if len(info.shape) == 1)
        in_file = sum(info.n_bytes for info in matrices) + norms
        assert model.memory.weights + model.memory.heads == in_file + embedding


# --- what the error says ---


def planned_tensors(config: Any) -> dict[str, TensorInfo]:
    """All tensors of a model: Q4_K matrices, F32 vectors."""
    shapes = base_tensors(config) | diffusion_tensors(config)
    tensors = {}
    for name, shape in shapes.items():
        kind = T.Q4_K if len(shape) == 2 else T.F32
        qblock, size = GGML_QUANT_SIZES[kind]
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        tensors[name] = TensorInfo(name, shape, kind, 0, count // qblock * size)
    return tensors


def qwen_plan(context: int, type_k: str = "f16", type_v: str = "f16") -> tuple[MemoryPlan, Any]:
    config = qwen3_0_6b()
    tensors = planned_tensors(config)
    plan = plan_weights(config, tensors, 86)
    return plan_memory(config, tensors, plan, context, type_k, type_v, 512), config


def test_known_sizes() -> None:
    """Qwen3-0.6B by hand: 440,401,920 weights in layers, 155,582,464 in the embedding."""
    plan, config = qwen_plan(4096)
    attention = 28 * (1024 * (16 + 2 * 8 + 16) * 128)
    layers = attention + 28 * 3 * 1024 * 3072
    embedding = 151936 * 1024
    per_weight = 4 + (16 + 4) * 8 / 256  # nibbles, scale words, d and dmin
    norms = 4 * (28 * (2 * 1024 + 4 * 128) + 1024)
    packed = (layers + embedding) * per_weight / 8 + embedding * 4.5 / 8 + norms
    assert plan.weights == packed
    assert plan.heads == attention * per_weight / 8
    assert plan.cache == 4096 * 28 * 2 * 8 * 128 * 2 == 448 << 20
    row, rest = cache_sizes(config, "q8_0", "q4_0")
    assert row == 28 * 8 * (128 * 34 // 32 + 128 * 18 // 32)
    assert rest == 64 * row, "columns for the branches of a tree"


def test_biases_count() -> None:
    """Those of q, k and v, of both views, f32."""
    sizes = []
    for architecture in (QWEN2, qwen3_0_6b().architecture):
        config = model_shape(architecture=architecture, n_layers=3)
        tensors = planned_tensors(config)
        sizes.append(allocated(empty_weights(config, tensors, plan_weights(config, tensors, 86))))
    biases, norms = 3 * 2 * 4 * (4 + 2 * 2) * 64, 3 * 2 * 2 * 64 * 4
    assert sizes[0] - biases == sizes[1] - norms


def test_what_fits_is_exact() -> None:
    plan, config = qwen_plan(40_000)
    largest = plan.largest_context(4 * GIB)
    fits, _ = qwen_plan(largest)
    beyond, _ = qwen_plan(largest + 1)
    assert fits.total <= 4 * GIB < beyond.total
    check_memory(fits, 4 * GIB, config, "f16", "f16", "cuda:0")
    with pytest.raises(OrthrusError) as caught:
        check_memory(plan, 4 * GIB, config, "f16", "f16", "cuda:0")
    message = str(caught.value)
    assert "\n" not in message
    assert f"-c {largest}" in message
    assert "-ctk q8_0 -ctv q8_0" in message
    numbers = [float(n) for n in re.findall(r"\d+\.\d\d", message)]
    assert numbers[0] == pytest.approx(sum(numbers[2:]), abs=0.03), "the parts add up"
    quantized, _ = qwen_plan(40_000, "q8_0", "q8_0")
    assert quantized.total <= 4 * GIB


def test_quantized_caches_may_need_a_smaller_context_too() -> None:
    plan, config = qwen_plan(200_000)
    with pytest.raises(OrthrusError, match=r"-ctk q8_0 -ctv q8_0 -c (\d+)") as caught:
        check_memory(plan, 4 * GIB, config, "f16", "f16", "cuda:0")
    found = re.search(r"-ctv q8_0 -c (\d+)", str(caught.value))
    assert found is not None
    assert qwen_plan(int(found[1]), "q8_0", "q8_0")[0].total <= 4 * GIB
    assert qwen_plan(int(found[1]) + 1, "q8_0", "q8_0")[0].total > 4 * GIB


def test_nothing_fits() -> None:
    plan, config = qwen_plan(100)
    with pytest.raises(OrthrusError, match="use a smaller quantization of the model, or --runtime"):
        check_memory(plan, 1 << 20, config, "f16", "f16", "cuda:0")


def test_memory_that_is_gone_while_loading(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(model_module, "load_weights", no_room)
    with (
        pytest.raises(OrthrusError, match="out of memory while loading") as caught,
        stand_in(demo_file("f16")),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_allocated() -> None:
    config = model_shape()
    for capacity, message in ((1 << 50, r"choose a smaller one with -c"), (0, "expected at least")):
        with pytest.raises(OrthrusError, match=message):
            CudaCache(config, "f16", "f16", capacity, torch.zeros(64, dtype=torch.uint8), 8)
