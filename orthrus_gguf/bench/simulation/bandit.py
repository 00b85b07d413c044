"""A naive bandit: the control that the controller is compared with.

It knows nothing of rows, costs and confidences. Eight fixed plans are its arms; it plays one for a
few cycles, keeps a running mean of the tokens per second of each, and mostly plays the best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orthrus_gguf.drafting import registry
from orthrus_gguf.drafting.cycle import Cycle, Hypothesis
from orthrus_gguf.drafting.draft import NO_DRAFT, Draft
from orthrus_gguf.drafting.drafter import Drafter, DraftPass
from orthrus_gguf.drafting.plan import FixedPolicy, Plan, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.model.config import ModelConfig

#: Cycles of one turn, the share of turns that try any arm, and the weight of the newest turn.
TURN, TRIES, NEWEST = 8, 0.1, 0.2


def arms(config: ModelConfig) -> list[Plan]:
    """Plain decoding, and seven plans that draft, from cautious to bold."""
    block = config.block_size or (8 if config.beside is None else config.beside.block)
    quarter, half, full = (max(block // n, 2) - 1 for n in (4, 2, 1))
    names = [f"two-pass@{width}" for width in (quarter, half, full)]
    if not config.has_heads:
        return [parse(name) for name in ("ar", *names)]
    names += [f"fused@{quarter}x2", f"fused@{half}x4", f"fused@{full}x1", f"fused@{full}x4"]
    return [parse(name) for name in ("ar", *names)]


class Bandit:
    """A `Policy`. Keep one, so that it goes on knowing what it learned."""

    def __init__(self, plans: Sequence[Plan], config: ModelConfig) -> None:
        self._arms = [FixedPolicy(plan, config) for plan in plans]
        self._rates = [np.inf] * len(plans)  # what was never tried comes first
        self._rng = np.random.default_rng(0)
        self._arm, self._cycles, self._tokens, self._seconds = 0, 0, 0, 0.0

    def drafters(self, sequence: TokenSequence) -> list[Drafter]:
        return registry.make_drafters(sequence, {"block", "carried", "dflash", "mtp"})

    def choose(
        self, drafts: Sequence[Draft], passes: Sequence[DraftPass], room: int, context: int
    ) -> Draft | DraftPass:
        arm = self._arms[self._arm]
        return arm.choose(drafts, passes, room, context) if arm.plan.drafts else NO_DRAFT

    def shape(
        self, draft: Draft, anchor: int, room: int, context: int
    ) -> tuple[Tree, Sequence[Hypothesis]]:
        return self._arms[self._arm].shape(draft, anchor, room, context)

    def observe(self, cycle: Cycle) -> None:
        self._cycles += 1
        self._tokens += len(cycle.tokens)
        self._seconds += cycle.seconds
        if self._cycles < TURN:
            return
        rate, old = self._tokens / self._seconds, self._rates[self._arm]
        self._rates[self._arm] = rate if np.isinf(old) else old + NEWEST * (rate - old)
        tries = self._rng.random() < TRIES and np.isfinite(self._rates).all()
        self._arm = int(self._rng.integers(len(self._arms)) if tries else np.argmax(self._rates))
        self._cycles, self._tokens, self._seconds = 0, 0, 0.0
