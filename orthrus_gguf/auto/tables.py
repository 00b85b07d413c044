"""What choices within a few cycles follow from: costs at the current context, and the rate."""

from __future__ import annotations

from dataclasses import field

from orthrus_gguf.auto.rate import Prospect, Values
from orthrus_gguf.records import dataclass


@dataclass(frozen=True)
class Tables:
    """verify: seconds of AR passes of 0, 1, ... rows at the current context. steady: what is best
    in the long run. values: of choices at its rate. carried: draft tokens that carried blocks are
    to bring. mixed: seconds of passes with both views, as far as they were asked for. idle: nothing
    pays but plain decoding, and what costs no pass."""

    verify: list[float]
    steady: Prospect
    values: Values
    carried: int
    context: int
    idle: bool
    mixed: dict[tuple[int, int], float] = field(default_factory=dict)
