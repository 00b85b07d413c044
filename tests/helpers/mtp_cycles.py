"""What decoding with an MTP block does, cycle by cycle, on any runtime; and what it should do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mtp_models import expected_cycles
from same_text import GREEDY

from orthrus_gguf.decode import drive, prefill, run_cycle
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.protocol import ar_segment
from orthrus_gguf.sampling import Sampler

PROMPTS: list[list[int]] = [[101], [130, 244], [92, 170, 241]]
PROMPTS.append(np.random.default_rng(3).integers(0, 256, 21).tolist())
TOKENS = 12
CAPACITY = 160


def sequence_of(model: ModelWithDrafter, prompt: Sequence[int]) -> TokenSequence:
    cache, beside = model.new_cache(CAPACITY), model.new_draft_cache(CAPACITY)
    return TokenSequence(model.config, cache, Sampler(GREEDY), list(prompt), draft_cache=beside)


def cycles_of(
    model: ModelWithDrafter,
    prompt: Sequence[int],
    plan: str,
    tokens: int = TOKENS,
    batch: int = 512,
) -> tuple[list[int], list[Cycle]]:
    """The text and what decoding did, cycle by cycle, never short of room."""
    sequence, policy = sequence_of(model, prompt), FixedPolicy(parse(plan), model.config)
    drafters = policy.drafters(sequence)
    drive(model, prefill(sequence, drafters, batch=batch))
    cycles = []
    while len(sequence.tokens) < len(prompt) + tokens:
        cycles.append(drive(model, run_cycle(sequence, policy, drafters, 100))[0])
    return sequence.tokens, cycles


def check_every_cycle(model: ModelWithDrafter, depth: int) -> None:
    """Drafts, and how many of them are right, for prompts shorter and longer than the
    convolution."""
    accepted = cycles = 0
    for prompt in PROMPTS:
        text, found = cycles_of(model, prompt, f"two-pass@{depth}")
        cache = model.new_cache(CAPACITY)
        last = model.config.n_layers + 1
        tapped = ar_segment(cache, text, 0, wanted=range(0), taps=(last,))
        (hidden,) = model.forward([tapped])[0].taps  # type: ignore[misc]
        expected = expected_cycles(text, hidden.astype(np.float64), len(prompt), depth)
        assert len(expected) >= len(found) - 1
        for ours, theirs in zip(found, expected, strict=False):
            assert (ours.start, list(ours.draft.tokens), ours.accepted) == theirs
        accepted += sum(cycle.accepted for cycle in found)
        cycles += len(found)
    assert accepted > 0.5 * cycles
