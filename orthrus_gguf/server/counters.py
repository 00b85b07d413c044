"""What the server counts from its start on: written by the scheduler, read by anybody."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from orthrus_gguf.request import Result


@dataclass
class Counters:
    """Sums over finished answers; passes and their company as they run.

    positions: accepted drafts by their position in the draft, counted from 0. shortened: answers
    whose prompt was; left_out: tokens that were not read for them.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    passes: int = 0
    busy: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    shortened: int = 0
    left_out: int = 0
    positions: Counter[int] = field(default_factory=Counter)

    def answered(self, result: Result) -> None:
        """Count one that has ended, however it did."""
        statistics, timings = result.statistics, result.timings
        self.prompt_tokens += timings.prompt_tokens
        self.prompt_seconds += timings.prompt
        self.generated_tokens += statistics.output_tokens
        self.generation_seconds += timings.generation
        self.drafts += sum(bool(cycle.drafts) for cycle in result.cycles)
        self.draft_tokens += sum(statistics.offered)
        self.accepted_tokens += sum(statistics.confirmed)
        if (selection := result.selection) is not None:
            self.shortened += 1
            self.left_out += selection.full - len(selection.tokens)
        self.positions.update(dict(enumerate(statistics.confirmed)))
