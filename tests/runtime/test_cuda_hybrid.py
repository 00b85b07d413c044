"""Hybrids on the CUDA runtime's stand-ins: what only it has. (`test_hybrid.py` holds what runtimes
share.)"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import FakeGraphs, small_heads, stand_in
from hf_hybrid import N_GREEDY, PROMPTS, write_hybrid
from mtp_models import stock_model
from numpy.typing import NDArray
from orthrus_converters.cli import main
from orthrus_kernels.elementwise.activations import padded_columns
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime import load
from orthrus_gguf.runtime.cuda import buffers, memory_plan, presence
from orthrus_gguf.runtime.cuda import cache as cache_module
from orthrus_gguf.runtime.cuda import state as state_module
from orthrus_gguf.runtime.cuda.cache import check_head_size
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.state import PENDING_ROWS, HybridCudaCache
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, resolve
from orthrus_gguf.runtime.protocol import Draw, ar_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TOKENS: list[int] = np.random.default_rng(12).integers(0, 256, 90).tolist()
GREEDY = Sampler(SamplingSettings(temperature=0))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    with small_heads():
        yield


@pytest.fixture(scope="module")
def model() -> Iterator[CudaModel]:
    with stand_in(stock_model(), capture=FakeGraphs()) as found:
        yield found


def new_cache(model: CudaModel, capacity: int) -> HybridCudaCache:
    cache = model.new_cache(capacity)
    assert isinstance(cache, HybridCudaCache)
    return cache


def append(model: CudaModel, cache: HybridCudaCache, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits of rows, which are committed."""
    (logits,) = model.logits([ar_segment(cache, tokens, cache.length)])
    cache.commit(range(len(tokens)))
    return logits


@pytest.fixture(scope="module")
def expected(model: CudaModel) -> NDArray[np.float32]:
    """Logits of the first rows, one by one."""
    cache = new_cache(model, 32)
    return np.concatenate([append(model, cache, [token]) for token in TOKENS[:20]])


def test_greedy_tokens_are_hugging_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With wide rows: the random model makes up to 3 % of the rounding of fp16 ones."""

    def wide(rows: int, columns: int, device: torch.device) -> Tensor:
        return torch.zeros(rows, padded_columns(columns), dtype=torch.float64, device=device)

    monkeypatch.setattr(buffers, "new_f16_rows", wide)
    path = tmp_path / "tiny.gguf"
    assert main([str(write_hybrid(tmp_path / "tiny")), str(path), "--type", "f32"]) == 0
    logits = np.load(GOLDEN / "hybrid.npz")
    greedy = json.loads((GOLDEN / "hybrid.json").read_text())["greedy"]
    with stand_in(path) as model:
        for index, prompt in enumerate(PROMPTS):
            cache, expected = new_cache(model, 64), logits[f"logits_{index}"]
            found = append(model, cache, prompt)
            np.testing.assert_allclose(found[-len(expected) :], expected, rtol=0, atol=0.03)
            text: list[int] = []
            for _ in range(N_GREEDY):
                text.append(int(found[-1].argmax()))
                found = append(model, cache, text[-1:])
            assert text == greedy[index]


def test_a_prompt_of_its_own_path(model: CudaModel) -> None:
    """More rows than a graph takes: products of other sums, the same recurrence; and from there on,
    and from a checkpoint behind it, as behind single rows."""
    alone, cache = new_cache(model, 128), new_cache(model, 128)
    wanted = np.concatenate([append(model, alone, TOKENS[i : i + 15]) for i in range(0, 90, 15)])
    found = append(model, cache, TOKENS[:80])
    assert ((found - wanted[:80]) ** 2).sum() < 1e-5 * (wanted**2).sum()
    place = cache.checkpoint()
    again = append(model, cache, TOKENS[80:])
    assert ((again - wanted[80:]) ** 2).sum() < 1e-5 * (wanted**2).sum()
    cache.restore(place)
    np.testing.assert_array_equal(append(model, cache, TOKENS[80:]), again)


@pytest.mark.parametrize("kernel", ["convolve", "recur", "gated_norm"])
@pytest.mark.parametrize("rows", [2, PENDING_ROWS + 1])
def test_a_pass_that_breaks_off(
    model: CudaModel,
    expected: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    rows: int,
) -> None:
    """Behind accepted rows, some layers have them and some do not: the next pass is right, and the
    one after it."""
    cache = new_cache(model, 64)
    append(model, cache, TOKENS[:2])
    launch, calls = getattr(model.machine.kernels, kernel), []

    def fail(*arguments: Any) -> None:
        calls.append(kernel)
        if len(calls) == 3:
            raise KeyboardInterrupt
        launch(*arguments)

    failing: dict[str, Any] = {kernel: fail}
    machine = replace(model.machine, kernels=replace(model.machine.kernels, **failing))
    monkeypatch.setattr(model, "_runner", replace(model.runner, machine=machine))
    monkeypatch.setattr(model.graphs, "run", lambda key, step: step())
    with pytest.raises(KeyboardInterrupt):
        model.logits([ar_segment(cache, [9] * rows, 2)])
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit([0])
    for first, stop in ((2, 5), (5, 6), (6, 20)):
        np.testing.assert_array_equal(append(model, cache, TOKENS[first:stop]),
                                      expected[first:stop])  # fmt: skip


def test_a_pass_again(model: CudaModel, expected: NDArray[np.float32]) -> None:
    """As often as it takes to time it: accepted rows become part of the state once."""
    cache = new_cache(model, 64)
    append(model, cache, TOKENS[:6])
    segment = ar_segment(cache, TOKENS[6:9], 6, draw=Draw(GREEDY, TOKENS))
    for _ in range(2):
        (choices,) = model.forward([segment])
    launch = model.launch_again([segment])
    with model.machine.running():
        launch()
        launch()
    (again,) = model.forward([segment])
    assert [c and c.token for c in again] == [c and c.token for c in choices]
    cache.commit(range(2))
    np.testing.assert_array_equal(append(model, cache, TOKENS[8:20]), expected[8:20])


def test_checked_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row again, alone: of a chain behind accepted rows, of a tree, beside another sequence;
    and a row whose state is spoilt is told."""
    monkeypatch.setenv("ORTHRUS_CHECK_ROWS", "1")
    with stand_in(stock_model()) as model:
        cache, other = new_cache(model, 64), new_cache(model, 64)
        append(model, cache, TOKENS[:3])
        model.logits([ar_segment(cache, TOKENS[3:7], 3), ar_segment(other, TOKENS[:2], 0)])
        cache.commit(range(2))
        other.commit([])
        model.logits([ar_segment(cache, TOKENS[5:11], 5, parents=(-1, 0, 0, 1, 2, 2))])
        cache.commit([0, 2])
        append(model, cache, TOKENS[:20])
        gated, calls = model.machine.kernels.gated_norm, []

        def spoilt(*arguments: Any) -> None:
            calls.append(len(arguments[0]))
            if calls.count(1) == 2:
                arguments[0].mul_(1.5)
            gated(*arguments)

        machine = replace(model.machine, kernels=replace(model.machine.kernels, gated_norm=spoilt))
        monkeypatch.setattr(model, "_runner", replace(model.runner, machine=machine))
        with pytest.raises(AssertionError, match="has other bits than alone"):
            model.logits([ar_segment(cache, TOKENS[:4], cache.length)])


def test_memory_is_what_is_said(model: CudaModel) -> None:
    cache = new_cache(model, 100)
    row, spare = memory_plan.cache_sizes(model.config, "f16", "f16")
    assert memory_plan.allocated((cache.planes, cache.state)) == 100 * row + spare
    hybrid = model.config.hybrid
    assert hybrid is not None
    assert cache.state is not None
    assert cache.state.memory[0].nbytes < hybrid.state_bytes(model.config.n_layers)
    held = memory_plan.allocated((model.runner.weights, model.runner.buffers))
    assert held <= model.memory.weights + model.memory.work
    cache.close()
    with pytest.raises(ValueError, match="closed"):
        model.logits([ar_segment(cache, [1], 0)])


@pytest.mark.parametrize(
    ("module", "function", "line"),
    [
        (cache_module, "new_cache_planes", "a context of 99 tokens cannot be allocated on cpu"),
        (state_module, "new_state", "a state of a hybrid cannot be allocated on cpu"),
    ],
)
def test_memory_that_cannot_be_had(
    model: CudaModel, monkeypatch: pytest.MonkeyPatch, module: Any, function: str, line: str
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(module, function, full)
    with pytest.raises(OrthrusError, match=rf"^{line}: out of memory\.; choose .*-c") as caught:
        model.new_cache(99)
    assert "\n" not in str(caught.value)


def test_trees_and_rows_that_are_too_many(model: CudaModel) -> None:
    cache = new_cache(model, 128)
    parents = (-1, *[0] * 20)
    assert cache.fit(parents) <= PENDING_ROWS
    assert cache.fit(range(-1, 40)) == PENDING_ROWS
    with pytest.raises(ValueError, match=f"a tree of 21 rows: at most {PENDING_ROWS}"):
        model.logits([ar_segment(cache, TOKENS[:21], 0, parents=parents)])
    model.logits([ar_segment(cache, TOKENS[:20], 0)])
    with pytest.raises(ValueError, match=f"19 of 20 rows: of more than {PENDING_ROWS}"):
        cache.commit(range(19))


def test_auto_takes_what_serves_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU where kernels take its heads, or else the CPU, with a line."""
    for module in (load, presence):
        monkeypatch.setattr(module, "gpu_visible", lambda: True)
        monkeypatch.setattr(module, "extra_installed", lambda: True)
    monkeypatch.setattr(load, "why_unusable", lambda device=None: None)
    said: list[str] = []
    with ModelFile.open(stock_model()) as file:
        config = file.config
    assert resolve(RuntimeSettings(), said.append, config).name is RuntimeName.CUDA
    assert said == []
    hybrid = config.hybrid
    assert hybrid is not None
    odd = replace(config, hybrid=replace(hybrid, head_dim=48))
    assert resolve(RuntimeSettings(), said.append, odd).name is RuntimeName.CPU
    line = said.pop()
    assert line.startswith("running on the CPU: ")
    assert "DeltaNet heads of 48" in line
    assert "\n" not in line
    with pytest.raises(OrthrusError, match="use --runtime cpu"):
        check_head_size(odd)
