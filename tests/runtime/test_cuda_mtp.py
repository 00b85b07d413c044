"""MTP blocks on the CUDA runtime, its kernels replaced by their plain references: every cycle
against the block in numpy, and as graphs that run what was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import FakeGraphs, small_heads
from mtp_cycles import PROMPTS, TOKENS, check_every_cycle, cycles_of
from mtp_models import (
    loaded_mtp,
    mtp_block,
    mtp_model,
    opened_mtp,
    stand_in_mtp,
    stock_model,
)
from same_text import (
    ENDLESS,
    GREEDY,
    check_pairs,
    check_side_by_side,
    finished,
    of_network,
    request,
)

from orthrus_gguf.engine import Session
from orthrus_gguf.request import Request
from orthrus_gguf.runtime import load as load_module
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.cuda import compile_ahead, compiling
from orthrus_gguf.runtime.cuda.memory_plan import allocated
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.mtp import BlockRunner, CudaBlock
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Draw, Segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

PLANS = ("two-pass@8+lookup", "two-pass@4+tree=6", "ar+mtp+lookup", "auto")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Iterator[ModelWithDrafter]:
    with stand_in_mtp(mtp_model(), capture=FakeGraphs()) as found:
        yield found


def block_of(model: ModelWithDrafter) -> CudaBlock:
    found = model._network._block  # type: ignore[attr-defined]
    assert isinstance(found, CudaBlock)
    return found


def drafts_of(model: ModelWithDrafter, plan: str = "two-pass@2") -> list[tuple[Any, int]]:
    cycles = cycles_of(model, PROMPTS[3], plan)[1]
    return [(cycle.draft.tokens, cycle.accepted) for cycle in cycles]


# --- drafts ---


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_cycle(model: ModelWithDrafter, depth: int) -> None:
    """Launched and replayed."""
    check_every_cycle(model, depth)
    assert block_of(model).graphs.captured > depth
    assert not block_of(model).graphs.failed


def test_prompts_in_pieces(model: ModelWithDrafter) -> None:
    """Rows are learned in passes of any size: the drafts are the same."""
    prompt = np.random.default_rng(8).integers(0, 256, 90).tolist()
    whole, pieces = (cycles_of(model, prompt, "two-pass", 6, rows)[1] for rows in (512, 7))
    assert [c.draft.tokens for c in pieces] == [c.draft.tokens for c in whole]


def test_a_block_in_a_file_of_its_own(model: ModelWithDrafter) -> None:
    """With the model's embedding and output matrix, or with its own."""
    expected = drafts_of(model)
    for own in (False, True):
        with stand_in_mtp(stock_model(), mtp_block(own=own)) as other:
            assert drafts_of(other) == expected


def chains(
    model: ModelWithDrafter, lengths: Sequence[int], settings: Sequence[SamplingSettings]
) -> list[Segment]:
    """One for each prompt, behind what a model might have given for it."""
    segments = []
    for prompt, length, some in zip(PROMPTS, lengths, settings, strict=True):
        beside, anchor = model.new_draft_cache(64), 42
        shape = (1, len(prompt), model.config.n_embd)
        beside.follow(prompt, 0, np.random.default_rng(6).standard_normal(shape, np.float32))
        draw = Draw(Sampler(some), [*prompt, anchor], detail=True)
        segments.append(beside.segment(anchor, len(prompt), length, draw))
    return segments


def drawn(model: ModelWithDrafter, segments: Sequence[Segment]) -> list[list[int]]:
    """Tokens of each chain, all in one pass."""
    found = [[choice.token for choice in found if choice] for found in model.forward(segments)]
    assert [len(tokens) for tokens in found] == [len(segment) for segment in segments]
    return found


def test_sampled_chains(model: ModelWithDrafter) -> None:
    """With the noise of their positions, as where logits are drawn from on the host."""
    case: Any = (4, 2, 8, 3), [SamplingSettings(temperature=0.8, seed=seed) for seed in range(4)]
    with loaded_mtp(mtp_model(), RuntimeName.REFERENCE) as reference:
        expected = drawn(reference, chains(reference, *case))
    assert drawn(model, chains(model, *case)) == expected


def test_drafts_of_the_first_ids() -> None:
    """Greedy, sampled, with penalties, and with bans of ids that are never drafted anyway; a chain
    is the same in company and alone."""
    ids, banned = 100, (7, 200, 269)
    odd = SamplingSettings(
        temperature=0.9, seed=3, repeat_penalty=1.1, presence_penalty=0.4, banned=banned
    )
    with stand_in_mtp(mtp_model(), ids=ids, capture=FakeGraphs()) as cut:
        drafted = [token for tokens, _ in drafts_of(cut, "two-pass@3") for token in tokens]
        assert 0 <= min(drafted) < max(drafted) < ids
        segments = chains(cut, (1, 3, 2, 3), (GREEDY, odd, odd, GREEDY))
        found = drawn(cut, segments)
        assert found == [drawn(cut, [segment])[0] for segment in segments]
        assert max(map(max, found)) < ids
        assert not {*banned} & {*found[1], *found[2]}


def test_where_nothing_can_be_drawn(model: ModelWithDrafter) -> None:
    """Logits that are not finite end a chain, and no other of the pass."""
    segments = chains(model, (3, 3, 2, 4), [GREEDY] * 4)
    expected = model.forward(segments)
    broken = model.new_draft_cache(64)
    broken.follow(PROMPTS[1], 0, np.full((1, 2, model.config.n_embd), np.inf, np.float32))
    found = model.forward([segments[0], replace(segments[1], cache=broken), *segments[2:]])
    assert [*found[1]] == [None] * 3
    assert [[*found[i]] for i in (0, 2, 3)] == [[*expected[i]] for i in (0, 2, 3)]


# --- the text ---


def test_the_text_is_that_of_plain_decoding(model: ModelWithDrafter) -> None:
    accepted = check_pairs(model, PLANS, PROMPTS[3:], (6,), TOKENS)
    assert min(accepted.values()) > 4, accepted


def test_side_by_side(model: ModelWithDrafter) -> None:
    """Chains of other lengths in one pass."""
    plans = ("two-pass@1", "two-pass@5", "ar", "ar+mtp")
    results = check_side_by_side(model, plans, PROMPTS, 8)
    assert of_network(model, results[1]) > 0


def test_quantized() -> None:
    """On int8 activations, as on a GeForce: drafts are nearly as often right as in float32."""
    accepted = cycles = 0
    types: Any = {"cache_type_k": "q8_0", "cache_type_v": "q4_0", "capability": 86}
    with stand_in_mtp(mtp_model("q4_k_m", wide=True), **types) as model:
        for prompt in PROMPTS[2:]:
            found = cycles_of(model, prompt, "two-pass@1", 16)[1]
            accepted += sum(cycle.accepted for cycle in found)
            cycles += len(found)
    assert accepted > 0.45 * cycles


def test_it_goes_back_where_the_model_does(
    model: ModelWithDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edited end: both caches go on from the last place that both can come back to."""
    monkeypatch.setattr("orthrus_gguf.runtime.checkpoints.CHECKPOINT_ROWS", 6)
    session = Session(model, ENDLESS, 128)

    def asked(prompt: Sequence[int]) -> Request:
        return request(model, "two-pass", prompt, 0, TOKENS)

    first = finished(session.generate(asked(PROMPTS[2])))
    edited = [*PROMPTS[2], *first.output[:-3], 9, 8]
    result = finished(session.generate(asked(edited)))
    again = finished(Session(model, ENDLESS, 128).generate(asked(edited)))
    assert result.output == again.output
    assert [c.draft.tokens for c in result.cycles] == [c.draft.tokens for c in again.cycles]
    assert result.statistics.cached_tokens > len(PROMPTS[2])


# --- memory, and who runs it ---


def test_the_plan_counts_it() -> None:
    """Weights, buffers and a cache of its own: what was planned is what is allocated; a shorter
    head takes nothing."""
    sizes = []
    for block, ids in ((None, None), (None, 100), (mtp_block(own=True), None)):
        with stand_in_mtp(mtp_model(), block, ids) as model:
            target, own = model.model, block_of(model)
            assert isinstance(target, CudaModel)
            runner, theirs = own.runner, target.runner
            assert isinstance(runner, BlockRunner)
            parts = (theirs.weights, theirs.buffers)
            more = (runner.weights, runner.buffers, runner.drafter, runner.own)
            assert target.memory.drafter == allocated((*parts, *more)) - allocated(parts)
            caches = (target.new_cache(77), own.new_rows(77))
            planned = 77 * target.memory.cache_row + target.memory.spare
            held = [allocated((cache.planes, getattr(cache, "state", None))) for cache in caches]
            assert sum(held) == planned
            sizes.append(target.memory.drafter)
    assert sizes[0] == sizes[1] < sizes[2]


def test_auto_takes_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU can be used, model and block are loaded there."""
    loaded = CudaModel.load
    monkeypatch.setattr(
        CudaModel, "load", lambda file, **options: loaded(file, **{**options, "device": "cpu"})
    )
    monkeypatch.setattr(load_module, "gpu_visible", lambda: True)
    monkeypatch.setattr(load_module, "extra_installed", lambda: True)
    monkeypatch.setattr(load_module, "why_unusable", lambda device=None: None)
    settings = RuntimeSettings(RuntimeName.AUTO)
    with small_heads(), opened_mtp(mtp_model()) as (file, block):
        model = load_model(file, settings, drafter=block, say=lambda line: None)
        assert isinstance(model, ModelWithDrafter)
        assert isinstance(block_of(model), CudaBlock)
        assert "cuda" in model.description
        model.close()


def test_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that compiles finds the block, where it lies, and how many ids it drafts of."""
    commands: list[Sequence[str]] = []
    needed: list[Any] = []

    def compiled(arguments: Sequence[str], what: str, say: Any) -> Any:
        commands.append(arguments)
        return nullcontext()

    def launches(*arguments: Any) -> list[Any]:
        needed.append(arguments)
        return []

    monkeypatch.setattr(compiling, "compiled", compiled)
    monkeypatch.setattr(compile_ahead, "needed_launches", launches)
    card: Any = SimpleNamespace(is_cuda=True, capability=86, name="a card")
    for target, block in ((mtp_model(), None), (stock_model(), mtp_block())):
        with opened_mtp(target, block, 100) as (file, beside):
            with compiling.kernels_compiled(file, card, ("f16", "f16"), 64, print, beside):
                assert compile_ahead.main(commands[-1]) == 0
            *_, (config, tensors), ids, _ = needed[-1]
            assert ids == 100
            assert config == replace(beside.config, name=config.name)
            assert {*tensors} == {*beside.tensors}
