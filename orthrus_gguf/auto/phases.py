"""What was decided while decoding, for `--explain`."""

from __future__ import annotations

from orthrus_gguf.auto.rate import Prospect
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.records import dataclass


@dataclass
class Phase:
    """Consecutive cycles under one prospect."""

    prospect: Prospect
    cycles: int = 0
    tokens: int = 0
    seconds: float = 0.0


def record(phases: list[Phase], steady: Prospect, cycle: Cycle) -> None:
    """Count a cycle in the last phase, or in a new one if the plan has changed."""
    phase = phases[-1] if phases else None
    if phase is None or (phase.prospect is not steady and phase.prospect.plan != steady.plan):
        phase = Phase(steady)
        phases.append(phase)
    phase.cycles += 1
    phase.tokens += len(cycle.tokens)
    phase.seconds += cycle.seconds
