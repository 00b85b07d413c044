"""What trained heads are worth: held-out prompts, decoded with them and counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.engine import Session
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.tokenizer import Tokenizer
from orthrus_gguf.training.answers import Answer

#: Texts that are decoded.
_MOST = 48


def decoded(
    model: Model, tokenizer: Tokenizer, held: Sequence[Answer], context: int
) -> dict[str, Any]:
    """Tokens per cycle of greedy two-pass decoding: over all, by domain, and the acceptance of each
    draft position among those that were verified. Also whether every text is the one that plain
    decoding gave."""
    session = Session(model, tokenizer, context)
    policy = FixedPolicy(parse("two-pass"), model.config)
    tokens: dict[str, int] = defaultdict(int)
    cycles: dict[str, int] = defaultdict(int)
    offered, confirmed, same = [0] * context, [0] * context, True
    for answer in held[:_MOST]:
        prompt, said = answer.tokens[: answer.n_prompt], answer.tokens[answer.n_prompt :]
        greedy = SamplingSettings(temperature=0.0)
        generation = session.generate(Request(prompt, greedy, policy, len(said)))
        for _ in generation:
            pass
        same = same and tuple(generation.output) == said
        for cycle in generation.result.cycles:
            tokens[answer.domain] += cycle.accepted + 1
            cycles[answer.domain] += 1
            for row in range(len(cycle.drafts)):
                offered[row] += row <= cycle.accepted
                confirmed[row] += row < cycle.accepted
    return {
        "texts": len(held[:_MOST]),
        "tokens_per_cycle": sum(tokens.values()) / max(1, sum(cycles.values())),
        "by_domain": {name: tokens[name] / cycles[name] for name in sorted(tokens)},
        "by_position": [c / o for c, o in zip(confirmed, offered, strict=True) if o],
        "same_text": same,
    }
