"""What a generation cost and gained, counted the same way everywhere.

Counting is where speculative decoders differ most, so: *tokens per cycle* is accepted drafts plus
one, averaged over cycles; *tokens per forward* is output tokens divided by all forward passes, the
prompt's counted as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Source
from orthrus_gguf.records import dataclass


@dataclass(frozen=True)
class Statistics:
    """Counts of one generation.

    prompt_tokens: those that were processed or cached: all of them, unless it ended before.
    offered, confirmed: per draft position (first after the anchor = index 0), in how many cycles
        it was proposed, and in how many it was accepted.
    sources: per source of drafts, in the order of their first use, cycles that verified its drafts,
        draft tokens verified and accepted.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    cycles: int
    forwards: int
    offered: tuple[int, ...]
    confirmed: tuple[int, ...]
    sources: tuple[tuple[Source, int, int, int], ...] = ()

    @property
    def tokens_per_cycle(self) -> float | None:
        return (sum(self.confirmed) + self.cycles) / self.cycles if self.cycles else None

    @property
    def tokens_per_forward(self) -> float | None:
        return self.output_tokens / self.forwards if self.output_tokens else None

    @property
    def acceptance(self) -> float | None:
        """Accepted share of all drafts."""
        return sum(self.confirmed) / sum(self.offered) if self.offered else None

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        return tuple(c / o for c, o in zip(self.confirmed, self.offered, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "cycles": self.cycles,
            "forwards": self.forwards,
            "tokens_per_cycle": self.tokens_per_cycle,
            "tokens_per_forward": self.tokens_per_forward,
            "drafted": sum(self.offered),
            "accepted": sum(self.confirmed),
            "acceptance": self.acceptance,
            "acceptance_by_position": list(self.acceptance_by_position),
            "sources": {
                source.name: {"cycles": cycles, "drafted": drafted, "accepted": accepted}
                for source, cycles, drafted, accepted in self.sources
            },
        }


@dataclass(frozen=True)
class Timings:
    """Wall-clock of one generation, in seconds. The first token comes out of the prompt's pass."""

    prompt: float
    generation: float
    prompt_tokens: int
    generated_tokens: int

    @property
    def prompt_per_second(self) -> float | None:
        return self.prompt_tokens / self.prompt if self.prompt_tokens and self.prompt else None

    @property
    def generated_per_second(self) -> float | None:
        if not self.generated_tokens or not self.generation:
            return None
        return self.generated_tokens / self.generation

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_ms": self.prompt * 1e3,
            "generation_ms": self.generation * 1e3,
            "prompt_tokens_per_second": self.prompt_per_second,
            "generation_tokens_per_second": self.generated_per_second,
        }


def count(
    cycles: Sequence[Cycle], *, prompt_tokens: int, cached_tokens: int, output_tokens: int
) -> Statistics:
    """Statistics of a finished generation from its cycles."""
    widest = max((len(c.drafts) for c in cycles), default=0)
    return Statistics(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        output_tokens=output_tokens,
        cycles=len(cycles),
        forwards=min(output_tokens, 1) + sum(len(c.passes) for c in cycles),
        offered=tuple(sum(len(c.drafts) > i for c in cycles) for i in range(widest)),
        confirmed=tuple(sum(c.accepted > i for c in cycles) for i in range(widest)),
        sources=_by_source(cycles),
    )


def _by_source(cycles: Sequence[Cycle]) -> tuple[tuple[Source, int, int, int], ...]:
    found: dict[Source, tuple[int, int, int]] = {}
    for cycle in cycles:
        if cycle.source is not None:
            times, drafted, accepted = found.get(cycle.source, (0, 0, 0))
            more = times + 1, drafted + len(cycle.drafts), accepted + cycle.accepted
            found[cycle.source] = more
    return tuple((source, *counts) for source, counts in found.items())
