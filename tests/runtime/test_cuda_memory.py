"""The CUDA runtime's memory plan, against what is really allocated and what files really hold."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from cuda_models import stand_in
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from orthrus_kernels.packing.pack import pack
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, TRAITS
from synthetic_model import model_shape, qwen3_0_6b

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.memory_plan import (
    GIB,
    MemoryPlan,
    buffer_bytes,
    cache_bytes,
    cache_row_bytes,
    check_memory,
    plan_memory,
)
from orthrus_gguf.runtime.cuda.model import spare_positions
from orthrus_gguf.runtime.cuda.weight_plan import packed_bytes, plan_weights

DemoFile = Callable[..., Path]


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a dataclass, a list or a dict, however deep."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from tensors_in(getattr(thing, field.name))
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from tensors_in(item)
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))


def allocated(thing: Any) -> int:
    """Bytes of the storages behind all tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in
                tensors_in(thing)}  # fmt: skip
    return sum(storages.values())


@pytest.mark.parametrize("kind", [*TRAITS, *PLAIN_TYPES], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [64, 200])
def test_packed_bytes(kind: T, rows: int) -> None:
    for k in (256, 768):
        qblock, size = GGML_QUANT_SIZES[kind]
        raw = torch.zeros(rows, k // qblock * size, dtype=torch.uint8)
        assert packed_bytes(kind, rows, k) == pack(raw, kind, k).nbytes
    if kind in PLAIN_TYPES or GGML_QUANT_SIZES[kind][0] == 32:
        qblock, size = GGML_QUANT_SIZES[kind]
        raw = torch.zeros(rows, 96 // qblock * size, dtype=torch.uint8)
        assert packed_bytes(kind, rows, 96) == pack(raw, kind, 96).nbytes


@pytest.mark.parametrize(
    ("kind", "capability"), [("f16", 80), ("q8_0", 86), ("q4_k_m", 86), ("f32", 80)]
)
def test_plan_and_reality(demo_file: DemoFile, kind: str, capability: int) -> None:
    with (
        stand_in(demo_file(kind), capability=capability) as model,
        ModelFile.open(demo_file(kind)) as file,
    ):
        config, runner = model.config, model.runner
        assert model.memory.weights + model.memory.heads == runner.weights.nbytes
        assert allocated(runner.weights) == runner.weights.nbytes
        plan = plan_weights(config, file.tensors, capability)
        assert buffer_bytes(config, plan) == allocated(runner.buffers)
        for type_k, type_v in (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0")):
            spare = spare_positions(model)
            cache = CudaCache(config, type_k, type_v, 77, torch.device("cpu"), spare)
            expected = cache_bytes(config, type_k, type_v, 77, spare)
            assert allocated([cache.layers, cache.history]) == expected


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


def qwen_plan(context: int, type_k: str = "f16", type_v: str = "f16") -> tuple[MemoryPlan, Any]:
    from orthrus_gguf.model.tensors import base_tensors, diffusion_tensors

    config = qwen3_0_6b()
    shapes = base_tensors(config) | diffusion_tensors(config)
    tensors = {}
    for name, shape in shapes.items():
        kind = T.Q4_K if len(shape) == 2 else T.F32
        qblock, size = GGML_QUANT_SIZES[kind]
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        tensors[name] = TensorInfo(name, shape, kind, 0, count // qblock * size)
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
    assert cache_row_bytes(config, "q8_0", "q4_0") == 28 * 8 * (128 * 34 // 32 + 128 * 18 // 32)


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


def test_a_cache_that_cannot_be_allocated() -> None:
    config = model_shape()
    for capacity, message in ((1 << 50, r"choose a smaller one with -c"), (0, "expected at least")):
        with pytest.raises(OrthrusError, match=message):
            CudaCache(config, "f16", "f16", capacity, torch.device("cpu"), 8)
