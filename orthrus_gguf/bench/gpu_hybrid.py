"""Checks of a hybrid on a GPU: whatever drafts and wherever a text goes on, it is the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from orthrus_kernels.tools.gpu_check_report import Check

from orthrus_gguf.bench.gpu_checks import (
    CAPACITY,
    GREEDY,
    Extent,
    company,
    drafted,
    generate,
    graphs,
    row_invariance,
)
from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.mtp import CudaBlock
from orthrus_gguf.runtime.mtp import MtpNetwork
from orthrus_gguf.sampling import Sampler

#: Shorter than what the convolution looks back on, repetitive, and longer than a pass.
PROMPTS = ((9,), (11, 12), (5, 6, 7, 8) * 4, tuple(range(20, 90)))

KIND = "f16"


def checks(path: Path, device: str | None, extent: Extent) -> Iterator[Check]:
    """Everything that the runtime promises about text, of a hybrid of any weights that holds an MTP
    block."""
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(path))
        block = stack.enter_context(MtpFile.inside(file))
        target = CudaModel.load(file, device=device, drafter=block)
        beside = CudaBlock.load_for(block, target)
        network = MtpNetwork(beside, block.beside, block.taps)
        model = stack.enter_context(closing(ModelWithDrafter(target, network)))
        for check in _checks(model, target, beside, extent):
            yield replace(check, name=f"{check.name}: hybrid")


def _checks(
    model: ModelWithDrafter, target: CudaModel, beside: CudaBlock, extent: Extent
) -> Iterator[Check]:
    yield row_invariance(target, extent.rows, KIND)
    yield company(target, KIND)
    yield _drafts(model, target, extent)
    yield _returns(target, extent.tokens)
    yield graphs(target, KIND)
    yield replace(graphs(beside, KIND), name="graphs of the MTP block")


def _drafts(model: ModelWithDrafter, target: CudaModel, extent: Extent) -> Check:
    """Text with chains of the MTP block and lookups against text without: drafts that are refused
    leave no trace in a state."""
    differing, verified, accepted = [], 0, 0
    prompts = PROMPTS[: 1 + extent.cases]
    for number, prompt in enumerate(prompts):
        cache = target.new_cache(CAPACITY)
        expected, _ = generate(target, cache, prompt, GREEDY, "ar", extent.tokens)
        found, cycles = drafted(model, prompt, extent.tokens, "ar+mtp+lookup")
        verified += sum(len(cycle.drafts) for cycle in cycles)
        accepted += sum(cycle.accepted for cycle in cycles)
        differing += [f"prompt {number}"] if found != expected else []
    detail = f"{len(prompts)} prompts, {accepted} of {verified} drafts accepted"
    return Check(
        "ar = MTP, lookups", not differing and verified > 0, "; ".join([detail, *differing])
    )


def _returns(model: CudaModel, n: int) -> Check:
    """A text that goes on from the end of its prompt once more."""
    prompt = PROMPTS[-1]
    cache = model.new_cache(CAPACITY)
    sequence = TokenSequence(model.config, cache, Sampler(GREEDY), list(prompt))
    drive(model, prefill(sequence))
    start, place = list(sequence.tokens), cache.checkpoint()
    texts = []
    for _ in range(2):
        texts.append(_continued(model, TokenSequence(
            model.config, cache, Sampler(GREEDY), list(start)), n))  # fmt: skip
        cache.restore(place)
    return Check("again from a checkpoint", texts[0] == texts[1], f"{n} tokens, twice")


def _continued(model: CudaModel, sequence: TokenSequence, n: int) -> Sequence[int]:
    list(decode(model, sequence, FixedPolicy(PLAIN, model.config), n))
    return sequence.tokens
