"""Checks of the whole runtime on a GPU, on the demo model: what it promises about text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from orthrus_kernels.tools.gpu_check_report import Check

from orthrus_gguf.decode import decode, drive, prefill, run_cycle
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.drafter import CudaNetwork
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

#: Rows of the caches: the longest golden prompt and its continuation fit.
CAPACITY = 256

#: Logits of the demo model in fp16 differ from float32 by up to this: a smaller lead is a tie.
TIE = 0.02

GREEDY = SamplingSettings(temperature=0)

#: A tree of drafts: two first choices, and what may follow each.
TREE = (-1, 0, 0, 1, 1, 2, 5, 5)


@dataclass(frozen=True)
class Extent:
    """How much is checked. cases: golden prompts; pairs: of prompt and seed; tokens: of each."""

    cases: int
    pairs: int
    tokens: int
    rows: int


FULL = Extent(cases=12, pairs=30, tokens=32, rows=64)
SMALL = Extent(cases=1, pairs=1, tokens=10, rows=9)


def checks(
    demo: Path, golden: dict[str, Any], device: str | None, extent: Extent, kinds: Sequence[str]
) -> Iterator[Check]:
    """Everything that the runtime promises about text, on the demo model, with caches of `kinds`.

    demo: the converted demo checkpoint (`--type f16` keeps it exact). golden: its outputs.
    """
    cases = golden["cases"][: extent.cases]
    with ModelFile.open(demo) as file:
        for kind in kinds:
            with CudaModel.load(file, device=device, cache_type_k=kind, cache_type_v=kind) as model:
                if kind == "f16":
                    yield from _golden(model, cases, extent)
                yield row_invariance(model, extent.rows, kind)
                yield company(model, kind)
                yield _strategies(model, golden["cases"], extent.pairs, extent.tokens, kind)
                yield graphs(model, kind)


def generate(
    model: CudaModel,
    cache: CudaCache,
    prompt: Sequence[int],
    settings: SamplingSettings,
    plan: str,
    n: int,
) -> tuple[list[int], list[Cycle]]:
    """`n` tokens, and their cycles; `plan` is spelt.

    cache: emptied first. One for many calls, so that their passes run as graphs.
    """
    cache.restore(cache.checkpoint(0))
    sequence = TokenSequence(model.config, cache, Sampler(settings), list(prompt))
    policy = FixedPolicy(parse(plan), model.config)
    drive(model, prefill(sequence))
    cycles = list(decode(model, sequence, policy, n - 1))
    return sequence.tokens[len(prompt) :], cycles


def drafter_checks(
    demo: Path,
    drafter: Path,
    golden: dict[str, Any],
    device: str | None,
    extent: Extent,
    kind: str,
) -> Iterator[Check]:
    """A drafter's network beside the demo model, with a cache of `kind`: the text that the model
    has alone, about as many accepted drafts as the reference implementation has, and graphs."""
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(demo))
        beside = stack.enter_context(DrafterFile.open(drafter, file.config, file.metadata))
        target = CudaModel.load(
            file, device=device, drafter=beside, cache_type_k=kind, cache_type_v=kind
        )
        network = CudaNetwork.load_for(beside, target)
        model = stack.enter_context(closing(ModelWithDrafter(target, network)))
        wrong: list[str] = []
        cycles = accepted = wanted = 0
        for number, case in enumerate(golden["cases"][: extent.cases]):
            count = min(case["n_new"], extent.tokens)
            expected, _ = generate(
                target, target.new_cache(CAPACITY), case["prompt_ids"], GREEDY, "ar", count
            )
            found, own = drafted(model, case["prompt_ids"], count, "ar+dflash")
            wrong += [f"case {number}"] if found != expected else []
            cycles += len(own)
            accepted += sum(cycle.accepted for cycle in own)
            theirs = case["cycles"][: len(own)]
            wanted += sum(cycle["accepted"] for cycle in theirs)
        detail = "; ".join(wrong) or f"{extent.cases} prompts at most"
        yield Check(f"ar = drafter, {kind} cache", not wrong, detail)
        detail = f"{accepted} accepted in {cycles} cycles; by the reference {wanted}"
        yield Check(f"accepted drafts, {kind} cache", accepted > 0.8 * wanted, detail)
        for name, one in (("model", target), ("network", network)):
            check = graphs(one, kind)
            yield Check(f"{check.name}, {name}", check.passed, check.detail)


def drafted(
    model: ModelWithDrafter, prompt: Sequence[int], n: int, plan: str
) -> tuple[list[int], list[Cycle]]:
    """`n` tokens with the drafts of a network beside the model, and their cycles."""
    caches = model.new_cache(CAPACITY), model.new_draft_cache(CAPACITY)
    sequence = TokenSequence(
        model.config, caches[0], Sampler(GREEDY), list(prompt), draft_cache=caches[1]
    )
    policy = FixedPolicy(parse(plan), model.config)
    drafters = policy.drafters(sequence)
    drive(model, prefill(sequence, drafters))
    cycles: list[Cycle] = []
    while len(sequence.tokens) < len(prompt) + n:
        cycles.append(drive(model, run_cycle(sequence, policy, drafters, 100))[0])
    return sequence.tokens[len(prompt) : len(prompt) + n], cycles


def _golden(model: CudaModel, cases: list[dict[str, Any]], extent: Extent) -> Iterator[Check]:
    ties: list[str] = []
    wrong: list[str] = []
    starts = 0
    cache = model.new_cache(CAPACITY)
    for number, case in enumerate(cases):
        prompt, wanted = case["prompt_ids"], case["output_ids"]
        found, cycles = generate(model, cache, prompt, GREEDY, "two-pass", case["n_new"])
        starts += [cycle.start for cycle in cycles] == case["cycle_starts"]
        if found != wanted:
            at = next(
                i for i, pair in enumerate(zip(found, wanted, strict=True)) if len({*pair}) > 1
            )
            lead = _lead(model, [*prompt, *wanted[:at]], found[at], wanted[at])
            text = f"case {number}, token {at}: {found[at]} before {wanted[at]} by {lead:.4f}"
            (ties if lead < TIE else wrong).append(text)
    equal = len(cases) - len(ties) - len(wrong)
    detail = f"{equal} of {len(cases)} equal; near ties: {'; '.join(ties) or 'none'}"
    yield Check("golden tokens", not wrong, "; ".join([detail, *wrong]))
    # A near tie in a draft moves a start: reported, and wrong only if it is the rule.
    yield Check("golden cycles", 2 * starts >= len(cases), f"{starts} of {len(cases)} equal")


def _lead(model: CudaModel, prefix: Sequence[int], first: int, second: int) -> float:
    """By how much the logit of `first` exceeds that of `second` after `prefix`."""
    last = range(len(prefix) - 1, len(prefix))
    segment = ar_segment(model.new_cache(len(prefix)), prefix, 0, wanted=last)
    (logits,) = model.logits([segment])
    return float(logits[0, first] - logits[0, second])


def row_invariance(model: CudaModel, rows: int, kind: str) -> Check:
    """Logits of a pass of many rows against the same rows in passes of 1 and 3, to the bit."""
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 4000, rows)]
    (together,) = model.logits([ar_segment(model.new_cache(rows), tokens, 0)])
    differing = []
    for size in (1, 3):
        cache, parts = model.new_cache(rows + 300), []
        for start in range(0, rows, size):
            part = tokens[start : start + size]
            parts += model.logits([ar_segment(cache, part, start)])
            cache.commit(range(len(part)))
        same = np.concatenate(parts).view(np.uint32) == together.view(np.uint32)
        differing += [f"row {row} (by {size})" for row in np.flatnonzero(~same.all(axis=1))]
    detail = "; ".join(differing[:4]) or f"{rows} rows at once, by 1 and by 3"
    return Check(f"rows bit for bit, {kind} cache", not differing, detail)


def company(model: CudaModel, kind: str) -> Check:
    """Four sequences in one pass, one of them a tree and one with a block, against each alone."""
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, 4000, 100)]
    segments: list[Segment] = []
    for number, length in enumerate((20, 63, 100, 5)):
        cache = model.new_cache(length + 40 + 8 * number)
        model.logits([ar_segment(cache, tokens[:length], 0, wanted=range(0))])
        cache.commit(range(length))
        parents = TREE if number == 2 else None
        segments.append(ar_segment(cache, tokens[: len(TREE)], length, parents=parents))
        mask = model.config.mask_token
        if number == 1 and mask is not None:
            segments.append(diffusion_segment(cache, tokens[1], mask, 8, length + 2))
    wrong = []
    for segment, found in zip(segments, model.logits(segments), strict=True):
        own = [other for other in segments if other.cache is segment.cache]
        alone = model.logits(own)[own.index(segment)]
        if not np.array_equal(found.view(np.uint32), alone.view(np.uint32)):
            wrong.append(f"{segment.view.value} rows behind {segment.cache.length}")
    block = " and a block" if len(segments) > 4 else ""
    detail = "; ".join(wrong) or f"four sequences, a tree{block} among them"
    return Check(f"company bit for bit, {kind} cache", not wrong, detail)


def graphs(model: CudaModel, kind: str) -> Check:
    """Whether passes were captured: running launch by launch gives the same text, slowly."""
    graphs = model.graphs
    passed = not graphs.failed and (graphs.captured > 0 or not model.machine.is_cuda)
    detail = f"{graphs.captured} captured, {graphs.failed} failed"
    return Check(f"graphs, {kind} cache", passed, detail)


def _strategies(
    model: CudaModel, cases: list[dict[str, Any]], pairs: int, n: int, kind: str
) -> Check:
    """AR against two-pass, fused and trees, widths 1 .. block size in turn, greedy and sampled."""
    block = model.config.block_size or 2
    differing, accepted = [], 0
    cache = model.new_cache(CAPACITY)
    for number in range(pairs):
        prompt = cases[number % len(cases)]["prompt_ids"]
        settings = GREEDY if number < len(cases) else SamplingSettings(seed=number)
        expected, _ = generate(model, cache, prompt, settings, "ar", n)
        width = 1 + number % block
        for plan in (
            f"two-pass@{width}",
            f"fused@{max(1, block - width)}x{1 + number % 3}",
            f"two-pass@{width}+tree={width + 3}",
        ):
            found, cycles = generate(model, cache, prompt, settings, plan, n)
            accepted += sum(cycle.accepted for cycle in cycles)
            if found != expected:
                differing.append(f"prompt {number % len(cases)}, seed {number}, {plan}")
    detail = "; ".join(differing[:3]) or f"{pairs} prompt and seed pairs, {accepted} accepted"
    passed = not differing and accepted > 0
    return Check(f"ar = two-pass = fused = tree, {kind} cache", passed, detail)
