"""A drafter's network beside the demo model, on the runtimes that have it, against the outputs of
z-lab's implementation (`golden/dflash.json`, `.npz`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drafters import drafter_file, loaded_pair
from numpy.typing import NDArray

from orthrus_gguf.decode import drive, prefill, run_cycle, run_together
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.beside import DraftCache, ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName
from orthrus_gguf.runtime.protocol import View, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

DemoFile = Callable[..., Path]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "dflash.json").read_text())["cases"]
GREEDY = SamplingSettings(temperature=0)
F32 = {"cache_type_k": "f32", "cache_type_v": "f32"}
CAPACITY = 160


@pytest.fixture(scope="module", params=[RuntimeName.REFERENCE, RuntimeName.CPU])
def model(request: pytest.FixtureRequest, demo_file: DemoFile) -> Iterator[ModelWithDrafter]:
    """In float32 all through."""
    with loaded_pair(demo_file("f32"), drafter_file(), request.param, **F32) as found:
        yield found


@pytest.fixture(scope="module")
def tensors() -> dict[str, NDArray[np.float32]]:
    return dict(np.load(GOLDEN / "dflash.npz"))


def sequence_of(model: ModelWithDrafter, prompt: list[int]) -> TokenSequence:
    cache, beside = model.new_cache(CAPACITY), model.new_draft_cache(CAPACITY)
    sampler = Sampler(GREEDY)
    return TokenSequence(model.config, cache, sampler, list(prompt), draft_cache=beside)


def cycles_of(
    model: ModelWithDrafter, case: dict[str, Any], plan: str = "ar+dflash", batch: int = 512
) -> list[Cycle]:
    """What decoding does, cycle by cycle, never short of room: until the text is as long as the
    golden one, which it must be."""
    sequence = sequence_of(model, case["prompt_ids"])
    policy = FixedPolicy(parse(plan), model.config)
    drafters = policy.drafters(sequence)
    drive(model, prefill(sequence, drafters, batch=batch))
    cycles, end = [], len(case["prompt_ids"]) + case["n_new"]
    while len(sequence.tokens) < end:
        cycles.append(drive(model, run_cycle(sequence, policy, drafters, 100))[0])
    assert sequence.tokens[end - case["n_new"] : end] == case["output_ids"]
    return cycles


# --- goldens ---


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_every_cycle_is_the_reference_implementations(
    model: ModelWithDrafter, case: dict[str, Any]
) -> None:
    cycles = cycles_of(model, case)
    assert case["cycles_needed"] - 1 <= len(cycles) <= len(case["cycles"])
    for ours, theirs in zip(cycles, case["cycles"], strict=False):
        assert ours.start == theirs["start"]
        assert list(ours.draft.tokens) == theirs["drafts"]
        assert ours.accepted == theirs["accepted"]
        assert ours.tokens[-1] == theirs["next"]


def held(cache: Any, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Keys and values of a float32 cache: [layers, length, KV heads, head_dim]."""
    if hasattr(cache, "k"):
        return cache.k[:, :length].numpy(), cache.v[:, :length].numpy()
    panels = cache.keys["0"][..., 0, :]  # [layers, heads, panels, head_dim, 16]
    layers, heads, count, dim, lanes = panels.shape
    keys = panels.transpose(0, 2, 4, 1, 3).reshape(layers, count * lanes, heads, dim)
    values = cache.values.view(np.float32).transpose(0, 2, 1, 3)
    return keys[:, :length], values[:, :length]


@pytest.mark.parametrize("number", [2, 5])
def test_tensors_of_two_cycles(
    model: ModelWithDrafter, tensors: dict[str, NDArray[np.float32]], number: int
) -> None:
    """Taps, what is injected of them, and the logits of the whole block."""
    case, told = CASES[number], []

    class Watched(DraftCache):
        def follow(self, tokens: Any, start: int, taps: NDArray[np.float32]) -> None:
            told.append(taps)
            super().follow(tokens, start, taps)

    sequence = sequence_of(model, case["prompt_ids"])
    network = model._network
    beside = sequence.draft_cache = Watched(network, CAPACITY)
    policy = FixedPolicy(parse("ar+dflash"), model.config)
    drafters = policy.drafters(sequence)
    drive(model, prefill(sequence, drafters))
    for i, cycle in enumerate(case["cycles"][:2]):
        golden = {
            key.split("_", 2)[2]: value
            for key, value in tensors.items()
            if key.startswith(f"case{number}_cycle{i}_")
        }
        taps = np.concatenate(list(told.pop()), axis=1)
        np.testing.assert_allclose(taps, golden["taps"], atol=1e-3)
        cache = beside.ready()
        assert cache.length == cycle["start"] == beside.length
        keys, values = held(cache, cycle["start"])
        for layer in range(2):
            for ours, name in ((keys, "k"), (values, "v")):
                theirs = golden[f"layer{layer}_{name}_injected"]
                np.testing.assert_allclose(ours[layer][-len(theirs) :], theirs, atol=1e-3)
        block = diffusion_segment(cache, cycle["anchor"], 4095, 8, cycle["start"])
        (logits,) = network.logits([block])  # type: ignore[attr-defined]
        np.testing.assert_allclose(logits, golden["block_logits"], atol=1e-3)
        drive(model, run_cycle(sequence, policy, drafters, 100))


@pytest.mark.parametrize("batch", [1, 3, 512])
def test_prompts_in_pieces(model: ModelWithDrafter, batch: int) -> None:
    whole = cycles_of(model, CASES[7])
    assert [c.accepted for c in cycles_of(model, CASES[7], batch=batch)] == [
        c.accepted for c in whole
    ]


def test_plans_that_use_it(model: ModelWithDrafter) -> None:
    """Narrow, and as trees of its marginals, which accept more."""
    per_cycle = {}
    for plan in ("ar+dflash", "two-pass@2+dflash", "two-pass@7+dflash+tree=16"):
        cycles = [cycle for case in CASES[3:5] for cycle in cycles_of(model, case, plan)]
        per_cycle[plan] = sum(cycle.accepted for cycle in cycles) / len(cycles)
        assert all(cycle.draft.source.name == "dflash" for cycle in cycles)
        assert all(p.drafter_rows == 8 for c in cycles for p in c.passes[:1])
    chain, narrow, tree = per_cycle.values()
    assert narrow < 2 < chain < tree - 0.1


# --- the cache ---


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("drafter", ["f32", "q8_0", "q4_k_m"])
def test_acceptance_on_every_cache(demo_file: DemoFile, cache_type: str, drafter: str) -> None:
    """3.0 in float32. (llama.cpp once lost all of it with q8_0.)"""
    types = {"cache_type_k": cache_type, "cache_type_v": cache_type}
    with loaded_pair(demo_file("f32"), drafter_file(drafter), RuntimeName.CPU, **types) as model:
        accepted = []
        for case in CASES:
            sequence = sequence_of(model, case["prompt_ids"])
            policy = FixedPolicy(parse("ar+dflash"), model.config)
            drafters = policy.drafters(sequence)
            drive(model, prefill(sequence, drafters))
            while len(sequence.tokens) < len(case["prompt_ids"]) + case["n_new"]:
                accepted.append(drive(model, run_cycle(sequence, policy, drafters, 99))[0].accepted)
    least = 2.5 if cache_type == "q4_0" else 2.75
    assert np.mean(accepted) > least


def test_it_goes_back_with_the_text(model: ModelWithDrafter) -> None:
    """Told another end of the text, it drafts as if it had never known the first."""
    first, case = CASES[3], CASES[4]
    fresh, used = (sequence_of(model, case["prompt_ids"]) for _ in range(2))
    policy = FixedPolicy(parse("ar+dflash"), model.config)
    assert used.draft_cache is not None
    drive(model, prefill(fresh, policy.drafters(fresh)))
    used.tokens[8:] = first["prompt_ids"]
    drafters = policy.drafters(used)
    drive(model, prefill(used, drafters))
    for _ in range(3):
        drive(model, run_cycle(used, policy, drafters, 50))
    assert used.draft_cache.length == used.cache.length > 8
    assert used.draft_cache.known(case["prompt_ids"]) == 8
    used.cache.restore(used.cache.checkpoint(8))
    used.tokens[:] = case["prompt_ids"]
    drive(model, prefill(used, drafters))
    assert used.draft_cache.length == fresh.cache.length
    found = [drive(model, run_cycle(s, policy, policy.drafters(s), 50))[0] for s in (fresh, used)]
    assert found[0].draft.tokens == found[1].draft.tokens
    assert found[0].draft.confidence == pytest.approx(found[1].draft.confidence, abs=1e-5)


def test_without_all_rows_it_drafts_nothing(model: ModelWithDrafter) -> None:
    """Rows that it was not told of: it says nothing rather than anything."""
    sequence = sequence_of(model, CASES[5]["prompt_ids"])
    drive(model, prefill(sequence))
    policy = FixedPolicy(parse("ar+dflash"), model.config)
    drafters = policy.drafters(sequence)
    for _ in range(3):
        cycle, _ = drive(model, run_cycle(sequence, policy, drafters, 20))
        assert not cycle.drafts
    assert sequence.draft_cache is not None
    assert sequence.draft_cache.length == 0


def test_sequences_side_by_side(model: ModelWithDrafter) -> None:
    """Four in every pass, drafts and verifications mixed: the cycles of each are its own."""
    sequences = [sequence_of(model, case["prompt_ids"]) for case in CASES[:4]]
    policies = [FixedPolicy(parse("ar+dflash"), model.config) for _ in sequences]
    drafters = [p.drafters(s) for p, s in zip(policies, sequences, strict=True)]
    for sequence, own in zip(sequences, drafters, strict=True):
        drive(model, prefill(sequence, own))
    steps = [run_cycle(s, p, d, 100) for s, p, d in zip(sequences, policies, drafters, strict=True)]
    waiting = {i: next(step) for i, step in enumerate(steps)}
    seen: list[list[int]] = [[] for _ in steps]
    views = set()
    while waiting:
        views.add(frozenset(s.view for segments in waiting.values() for s in segments))
        members = list(waiting)
        for i, done in zip(members, run_together(model, list(waiting.values())), strict=True):
            del waiting[i]
            try:
                waiting[i] = steps[i].send(done)
            except StopIteration as end:
                seen[i].append(end.value[0].accepted)
                if len(seen[i]) < 8 - i:  # out of step
                    steps[i] = run_cycle(sequences[i], policies[i], drafters[i], 100)
                    if i % 2 == len(seen[i]) % 2:
                        done = run_together(model, [next(steps[i])])[0]
                        waiting[i] = steps[i].send(done)
                    else:
                        waiting[i] = next(steps[i])
    assert frozenset((View.AR, View.DRAFTER)) in views
    for found, case in zip(seen, CASES, strict=False):
        assert found == [cycle["accepted"] for cycle in case["cycles"][: len(found)]]


def test_a_full_context(model: ModelWithDrafter) -> None:
    """Blocks that reach beyond the end of the cache."""
    case = CASES[4]
    sequence = sequence_of(model, case["prompt_ids"])
    room = len(case["prompt_ids"]) + 21
    sequence.cache, sequence.draft_cache = model.new_cache(room), model.new_draft_cache(room)
    policy = FixedPolicy(parse("ar+dflash"), model.config)
    drafters = policy.drafters(sequence)
    drive(model, prefill(sequence, drafters))
    while (left := room - len(sequence.tokens)) > 0:
        drive(model, run_cycle(sequence, policy, drafters, left))
    assert sequence.tokens[-21:] == case["output_ids"][:21]


# --- what is refused ---


def test_blocks_of_a_drafter_need_one(model: ModelWithDrafter) -> None:
    cache = model.new_cache(20)
    block = diffusion_segment(cache, 1, 2, 8, 0, view=View.DRAFTER)
    with pytest.raises(ValueError, match="no drafter beside the model"):
        model.logits([block])
    with pytest.raises(TypeError, match="expected a drafter's cache"):
        model.forward([block, ar_segment(cache, [1], 0)])
    assert cache.length == 0


@pytest.mark.parametrize("runtime", [RuntimeName.GGML])
def test_other_runtimes_say_so(demo_file: DemoFile, runtime: RuntimeName) -> None:
    with (
        pytest.raises(OrthrusError, match=r"--runtime ggml has none; use --runtime auto"),
        loaded_pair(demo_file("f32"), drafter_file(), runtime),
    ):
        pass


def test_weights_that_the_kernels_lack(demo_file: DemoFile, tmp_path: Path) -> None:
    with (
        pytest.raises(OrthrusError, match=r"needs the native kernels, which cannot run it: .*IQ3"),
        loaded_pair(demo_file("f32"), drafter_file("iq3_s"), RuntimeName.CPU),
    ):
        pass


def test_a_context_too_large(demo_file: DemoFile) -> None:
    with (
        loaded_pair(demo_file("f32"), drafter_file(), RuntimeName.CPU) as model,
        pytest.raises(OrthrusError, match="does not fit"),
    ):
        model.new_draft_cache(1 << 40)
