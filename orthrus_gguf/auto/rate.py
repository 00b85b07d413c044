"""What steady decoding would bring: from costs and acceptance to a going rate.

Cycles differ in what they start with. Some have a draft that a block of the pass before left; the
others must draft first, decode plainly, or decode plainly with a block alongside. The *going rate*
g, in tokens per second, is the one at which the best of these three is worth nothing: its tokens
equal what its time brings at g. A draft at hand is then worth its *gain*. (This is the average
reward of a semi-Markov process, solved for its two states.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.drafting.draft import Guess
from orthrus_gguf.drafting.policy import Plan, Strategy

Floats = NDArray[np.float64]

#: A strategy must promise this much more than plain decoding to be preferred to it.
MARGIN = 1.02


@dataclass(frozen=True)
class Outlook:
    """A steady strategy and what it promises, in tokens per second."""

    plan: Plan
    rate: float


@dataclass(frozen=True)
class Estimates:
    """Everything that an outlook follows from.

    verify: seconds of AR passes of 0 (none), 1, ... rows; draft: of blocks that bring 0 (none), 1,
        ... draft tokens; lead: that a block adds to an AR pass of one row.
    block: tokens that will be accepted of drafts of 0, 1, ... tokens, from draft passes; carried:
        the same by guess, from blocks that ride in verify passes.
    hits, riding: the share of cycles that such blocks serve, by guess, and the seconds they add.
    """

    verify: Floats
    draft: Floats
    lead: float
    block: Floats
    carried: Mapping[Guess, Floats]
    hits: Mapping[Guess, float]
    riding: float


@dataclass(frozen=True)
class Values:
    """Worth at a going rate, in tokens.

    plain, lead, drafting: of a cycle without a draft, done plainly, with a block alongside, after a
        draft pass of `width` tokens.
    gain: of a draft at hand, by the guess that led to it. onward: of the blocks that ride in a
        cycle, less their time. rider: of the time of one block.
    """

    plain: float
    lead: float
    drafting: float
    width: int
    gain: Mapping[Guess, float]
    onward: float
    rider: float


#: Without diffusion heads, lookups are weighed against plain decoding, and that is all.
NO_HEADS = Values(0.0, float("-inf"), float("-inf"), 0, dict.fromkeys(Guess, 0.0), 0.0, 0.0)


def values(estimates: Estimates, rate: float) -> Values:
    """See `Values`."""
    e = estimates
    times = rate * e.verify[1 : len(e.block) + 1]
    alone = {guess: float(np.max(n + 1 - times[: len(n)])) for guess, n in e.carried.items()}
    promised = sum(e.hits[guess] * max(alone[guess], 0.0) for guess in Guess)
    # A block that comes true makes way for the next one, and so on: a geometric series.
    onward = max(promised - rate * e.riding, 0.0) / max(1 - sum(e.hits.values()), 0.05)
    drafting = e.block[1:] + 1 - times[1:] - rate * e.draft[1:]
    width = int(np.argmax(drafting)) + 1
    gain = {guess: value + onward for guess, value in alone.items()}
    plain = 1 - rate * float(e.verify[1])
    return Values(
        plain=plain,
        lead=plain - rate * e.lead + gain[Guess.LAST],
        drafting=float(drafting[width - 1]) + onward,
        width=width,
        gain=gain,
        onward=onward,
        rider=rate * e.lead,
    )


def outlook(estimates: Estimates, *, blocks: int, width: int, lookup: bool) -> Outlook:
    """The going rate, and the strategy that promises it. blocks, width: of blocks that ride along,
    as they have been."""
    plain = 1 / float(estimates.verify[1])

    def surplus(rate: float) -> float:
        found = values(estimates, rate)
        return max(found.lead, found.drafting)

    rate = _root(surplus, plain, plain * (len(estimates.block) + 1))
    if rate < MARGIN * plain:
        return Outlook(Plan(Strategy.AR, 0, lookup=lookup), plain)
    found = values(estimates, rate)
    if found.onward > 0 or found.lead > found.drafting:
        return Outlook(Plan(Strategy.FUSED, width, blocks, lookup=lookup), rate)
    return Outlook(Plan(Strategy.TWO_PASS, found.width, lookup=lookup), rate)


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function is 0, to one part in a thousand; `low` if it is negative there."""
    if falling(low) <= 0:
        return low
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return low


def best_width(
    carried: Mapping[Guess, Floats],
    hits: Mapping[Guess, float],
    verify: Floats,
    rate: float,
    riding: Callable[[int], float],
) -> int:
    """Draft tokens that blocks which ride along had best bring.

    carried: as in `Estimates`. riding: seconds of passes whose blocks bring so many.
    """
    length = len(carried[Guess.NEXT])
    best = np.zeros(length)
    for guess, n in carried.items():
        best += hits[guess] * np.maximum.accumulate(n + 1 - rate * verify[1 : length + 1])
    # The optimum is flat: eight or so widths are enough.
    widths = range(min(3, length - 1), length, max((length - 1) // 8, 1))
    return max(widths, key=lambda width: float(best[width]) - rate * riding(width))
