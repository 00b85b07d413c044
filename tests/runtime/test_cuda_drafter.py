"""A drafter's network on the CUDA runtime, its kernels replaced by their plain references, against
the outputs of z-lab's implementation, and as graphs that run what was recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from cuda_models import FakeGraphs
from drafters import drafter_file, stand_in_pair
from timeless import Timeless

from orthrus_gguf.decode import drive, prefill, run_cycle, run_together
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime import load as load_module
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.cuda.device import Machine
from orthrus_gguf.runtime.cuda.drafter import CudaNetwork
from orthrus_gguf.runtime.cuda.drafter_weights import plan_beside
from orthrus_gguf.runtime.cuda.fit import LEAST, fitting_context
from orthrus_gguf.runtime.cuda.kernels import STAND_INS
from orthrus_gguf.runtime.cuda.memory_plan import allocated, plan_memory
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.weight_plan import plan_weights
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.sampling import Sampler, SamplingSettings

DemoFile = Callable[..., Path]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "dflash.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]
GREEDY = SamplingSettings(temperature=0)
DFLASH = parse("ar+dflash")


@pytest.fixture(scope="module")
def model(demo_file: DemoFile) -> Iterator[ModelWithDrafter]:
    path = demo_file("f16", split=True)  # a stock model, without heads
    with stand_in_pair(path, drafter_file("f16"), capture=FakeGraphs()) as found:
        yield found


def sequence_of(model: ModelWithDrafter, prompt: list[int], capacity: int = 160) -> TokenSequence:
    cache, beside = model.new_cache(capacity), model.new_draft_cache(capacity)
    return TokenSequence(model.config, cache, Sampler(GREEDY), list(prompt), draft_cache=beside)


def cycles_of(
    model: ModelWithDrafter, case: dict[str, Any], plan: str = "ar+dflash", batch: int = 512
) -> list[Cycle]:
    return cycles_under(model, case, FixedPolicy(parse(plan), model.config), batch)


def cycles_under(
    model: ModelWithDrafter, case: dict[str, Any], policy: Policy, batch: int = 512
) -> list[Cycle]:
    """Until the text is as long as the golden one."""
    sequence = sequence_of(model, case["prompt_ids"])
    drafters = policy.drafters(sequence)
    drive(model, prefill(sequence, drafters, batch=batch))
    cycles, end = [], len(case["prompt_ids"]) + case["n_new"]
    while len(sequence.tokens) < end:
        cycles.append(drive(model, run_cycle(sequence, policy, drafters, 100))[0])
    assert sequence.tokens[end - case["n_new"] : end] == case["output_ids"]
    return cycles


@pytest.mark.parametrize("number", [0, 5])
def test_cycles_are_the_reference_implementations(model: ModelWithDrafter, number: int) -> None:
    """Drafts, accepted counts and text of every cycle, launched and replayed."""
    case = CASES[number]
    for batch in (512, 5):
        cycles = cycles_of(model, case, batch=batch)
        for ours, theirs in zip(cycles, case["cycles"], strict=False):
            assert ours.start == theirs["start"]
            assert list(ours.draft.tokens) == theirs["drafts"]
            assert ours.accepted == theirs["accepted"]
    network = model._network
    assert isinstance(network, CudaNetwork)
    assert network.graphs.captured > 2
    assert not network.graphs.failed


def test_trees_of_its_marginals_accept_more(model: ModelWithDrafter) -> None:
    per_cycle = []
    for plan in ("ar+dflash", "two-pass@7+dflash+tree=16"):
        cycles = [cycle for case in CASES[3:5] for cycle in cycles_of(model, case, plan)]
        per_cycle.append(sum(cycle.accepted for cycle in cycles) / len(cycles))
    assert per_cycle[1] > per_cycle[0] + 0.1


def test_auto_verifies_trees_of_its_marginals(model: ModelWithDrafter) -> None:
    """Where rows are cheap, whatever the runtime; the text takes fewer passes than in chains."""
    policies = (Timeless(0.01, None, without=["lookup"]), FixedPolicy(DFLASH, model.config))
    auto, chains = (
        [cycle for case in CASES[3:5] for cycle in cycles_under(model, case, policy)]
        for policy in policies
    )
    drafted = [c for c in auto if c.draft.source.name == "dflash"]
    trees = [c for c in drafted if c.passes[-1].ar_rows > len(c.drafts) + 1]
    assert len(trees) > 0.8 * len(drafted) > 4
    passes = [sum(len(c.passes) for c in cycles) for cycles in (auto, chains)]
    assert passes[0] < passes[1]


def _sent(step: Any, choices: Any) -> tuple[Any, Cycle | None]:
    """What a cycle wants to know next, or what it was."""
    try:
        return step.send(choices), None
    except StopIteration as end:
        return None, end.value[0]


def test_sequences_in_the_same_passes(model: ModelWithDrafter) -> None:
    """Two in every pass; each has the cycles that it has alone."""
    cases = CASES[:2]
    sequences = [sequence_of(model, case["prompt_ids"]) for case in cases]
    policy = FixedPolicy(parse("ar+dflash"), model.config)
    drafters = [policy.drafters(sequence) for sequence in sequences]
    for sequence, own in zip(sequences, drafters, strict=True):
        drive(model, prefill(sequence, own))
    for turn in range(5):
        steps = [run_cycle(s, policy, d, 100) for s, d in zip(sequences, drafters, strict=True)]
        waiting = [next(step) for step in steps]
        ended: list[Cycle | None] = [None]
        while None in ended:
            found = run_together(model, waiting)
            sent = [_sent(step, choices) for step, choices in zip(steps, found, strict=True)]
            waiting, ended = [more for more, _ in sent if more], [cycle for _, cycle in sent]
        for cycle, case in zip(ended, cases, strict=True):
            assert cycle is not None
            assert cycle.accepted == case["cycles"][turn]["accepted"]


@pytest.mark.parametrize(
    ("drafter", "capability", "cache_type"),
    [("q8_0", 86, "q8_0"), ("q4_k_m", 80, "q4_0")],
)
def test_acceptance_with_quantized_weights_and_caches(
    demo_file: DemoFile, drafter: str, capability: int, cache_type: str
) -> None:
    """int8 activations on 86."""
    settings = {"capability": capability, "cache_type_k": cache_type, "cache_type_v": cache_type}
    with stand_in_pair(demo_file("f16"), drafter_file(drafter), **settings) as model:
        accepted, wanted = [], []
        for case in (CASES[2], CASES[4]):
            sequence = sequence_of(model, case["prompt_ids"])
            policy = FixedPolicy(parse("ar+dflash"), model.config)
            drafters = policy.drafters(sequence)
            drive(model, prefill(sequence, drafters))
            while len(sequence.tokens) < len(case["prompt_ids"]) + case["n_new"]:
                accepted.append(drive(model, run_cycle(sequence, policy, drafters, 99))[0].accepted)
            wanted += [c["accepted"] for c in case["cycles"][: case["cycles_needed"]]]
    assert sum(accepted) / len(accepted) > 0.9 * sum(wanted) / len(wanted)


def test_it_goes_back_with_the_text(model: ModelWithDrafter) -> None:
    """Told another end of the text, it drafts as if it had never known the first."""
    first, case = CASES[3], CASES[4]
    fresh, used = (sequence_of(model, case["prompt_ids"]) for _ in range(2))
    policy = FixedPolicy(parse("ar+dflash"), model.config)
    drive(model, prefill(fresh, policy.drafters(fresh)))
    used.tokens[8:] = first["prompt_ids"]
    drafters = policy.drafters(used)
    drive(model, prefill(used, drafters))
    drive(model, run_cycle(used, policy, drafters, 50))
    used.cache.restore(used.cache.checkpoint(8))
    used.tokens[:] = case["prompt_ids"]
    drive(model, prefill(used, drafters))
    found = [drive(model, run_cycle(s, policy, policy.drafters(s), 50))[0] for s in (fresh, used)]
    assert found[0].draft.tokens == found[1].draft.tokens
    assert found[0].draft.confidence == pytest.approx(found[1].draft.confidence, abs=1e-3)


# --- memory ---


class Card(Machine):
    """A machine with so many bytes free."""

    def free_bytes(self) -> int:
        return int(self.name)


def test_the_plan_counts_it(demo_file: DemoFile) -> None:
    """Weights, buffers and a cache of its own: what was planned is what is allocated."""
    with stand_in_pair(demo_file("f16"), drafter_file("q4_k_m"), capability=86) as model:
        target, network = model.model, model._network
        assert isinstance(target, CudaModel)
        assert isinstance(network, CudaNetwork)
        own, theirs = network.runner, target.runner
        parts = (theirs.weights, theirs.buffers)
        more = (own.weights, own.buffers, own.drafter, own.own)  # type: ignore[attr-defined]
        assert target.memory.drafter == allocated((*parts, *more)) - allocated(parts)
        caches = (target.new_cache(77), network.new_cache(77))
        planned = 77 * target.memory.cache_row + target.memory.spare
        assert sum(allocated(cache.planes) for cache in caches) == planned


def test_a_context_that_fits_beside_it(demo_file: DemoFile) -> None:
    with ModelFile.open(demo_file("f16")) as file:
        opened = DrafterFile.open(drafter_file("f16"), file.config, file.metadata)
        with opened as drafter:
            plan = plan_weights(file.config, file.tensors, 86)
            beside = plan_beside(drafter, plan, 86)
            types, wanted = ("f16", "f16"), 3 * LEAST
            alone, both = (
                plan_memory(file.config, file.tensors, plan, wanted, *types, 512, one)
                for one in (None, beside)
            )
            free = both.total - LEAST * both.cache_row
            assert alone.total < free
            card = Card(torch.device("cpu"), str(free), 86, STAND_INS, {}, None, False)
            said: list[str] = []
            ask = (file, None, types, wanted, said.append, card)
            assert fitting_context(*ask) == wanted
            fitting = fitting_context(*ask, drafter=drafter)
    assert LEAST <= fitting < wanted
    assert "-ctk q8_0 -ctv q8_0 holds" in said[0]


# --- who runs it ---


def test_auto_takes_the_gpu(demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU can be used, model and drafter are loaded there."""
    loaded = CudaModel.load

    def on_stand_ins(file: ModelFile, **options: Any) -> CudaModel:
        return loaded(file, **{**options, "device": "cpu"})

    monkeypatch.setattr(CudaModel, "load", on_stand_ins)
    monkeypatch.setattr(load_module, "gpu_visible", lambda: True)
    monkeypatch.setattr(load_module, "extra_installed", lambda: True)
    monkeypatch.setattr(load_module, "why_unusable", lambda device=None: None)
    with ModelFile.open(demo_file("q8_0")) as file:
        opened = DrafterFile.open(drafter_file("q8_0"), file.config, file.metadata)
        with opened as drafter:
            settings = RuntimeSettings(RuntimeName.AUTO)
            model = load_model(file, settings, drafter=drafter, say=lambda line: None)
            assert isinstance(model, ModelWithDrafter)
            assert "cuda" in model.description
            assert "with drafter" in model.description
            model.close()


def test_heads_without_kernels(demo_file: DemoFile) -> None:
    with ModelFile.open(demo_file("f16")) as file:
        opened = DrafterFile.open(drafter_file("f16"), file.config, file.metadata)
        with opened as drafter:
            drafter.config = replace(drafter.config, head_dim=48)
            with pytest.raises(OrthrusError, match="heads of 48 elements have no CUDA kernel"):
                CudaModel.load(file, device="cpu", drafter=drafter)
