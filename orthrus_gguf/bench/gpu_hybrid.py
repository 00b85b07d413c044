"""Checks of a hybrid on a GPU: whatever drafts and wherever a text goes on, it is the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from orthrus_kernels.tools.gpu_check_report import Check

from orthrus_gguf.bench.gpu_checks import (
    CAPACITY,
    GREEDY,
    Extent,
    company,
    generate,
    graphs,
    row_invariance,
)
from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.sampling import Sampler

#: Shorter than what the convolution looks back on, repetitive, and longer than a pass.
PROMPTS = ((9,), (11, 12), (5, 6, 7, 8) * 4, tuple(range(20, 90)))

KIND = "f16"


def checks(path: Path, device: str | None, extent: Extent) -> Iterator[Check]:
    """Everything that the runtime promises about text, of a hybrid of any weights."""
    with ModelFile.open(path) as file, CudaModel.load(file, device=device) as model:
        for check in (
            row_invariance(model, extent.rows, KIND),
            company(model, KIND),
            _lookups(model, extent.tokens),
            _returns(model, extent.tokens),
            graphs(model, KIND),
        ):
            yield Check(f"hybrid: {check.name}", check.passed, check.detail)


def _lookups(model: CudaModel, n: int) -> Check:
    """Text with lookups against text without: rejected drafts leave no trace in a state."""
    differing, drafted, accepted = [], 0, 0
    cache = model.new_cache(CAPACITY)
    for number, prompt in enumerate(PROMPTS):
        expected, _ = generate(model, cache, prompt, GREEDY, "ar", n)
        found, cycles = generate(model, cache, prompt, GREEDY, "ar+lookup", n)
        drafted += sum(len(cycle.drafts) for cycle in cycles)
        accepted += sum(cycle.accepted for cycle in cycles)
        differing += [f"prompt {number}"] if found != expected else []
    detail = "; ".join(differing) or f"{len(PROMPTS)} prompts, {accepted} of {drafted} accepted"
    return Check("ar = lookups", not differing and drafted > 0, detail)


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
