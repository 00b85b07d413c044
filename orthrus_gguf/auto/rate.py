"""What steady decoding would bring: from costs and acceptance to a rate of tokens per second.

Cycles differ in what they start with. Some have a draft that a block of the pass before left; the
others must draft first, decode plainly, or decode plainly with a block alongside. The *rate* g that
is solved for, in tokens per second, is the one at which the best of these three is worth nothing:
its tokens equal what its time brings at g. A draft at hand is then worth its *gain*. (This is the
average reward of a semi-Markov process, solved for its two states.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.drafting.carried_blocks import SOURCES
from orthrus_gguf.drafting.cycle import Guess
from orthrus_gguf.drafting.draft import Source
from orthrus_gguf.drafting.plan import PLAIN, Plan, Strategy
from orthrus_gguf.records import dataclass

Floats = NDArray[np.float64]

#: A strategy must promise this much more than plain decoding to be preferred to it.
MARGIN = 1.02


@dataclass(frozen=True)
class Prospect:
    """A steady strategy and what it promises, in tokens per second.

    source: of its draft passes, None where it has none.
    """

    plan: Plan
    rate: float
    source: Source | None = None


@dataclass(frozen=True)
class Drafting:
    """What trees of 1, 2, ... draft tokens from one kind of draft pass promise.

    tokens: how many of them will be accepted. widths: how deep the tree goes, equally the tokens
    that the pass must bring. seconds: of that pass.
    """

    tokens: Floats
    widths: NDArray[np.int64]
    seconds: Floats


@dataclass(frozen=True)
class Estimates:
    """Everything that a prospect follows from.

    verify: seconds of AR passes of 0 (none), 1, ... rows; lead: that a block adds to an AR pass of
        one row. passes: by source, what draft passes promise, and a rule for what to verify of any
        draft. trees: by source, tokens that will be accepted of trees of 1, 2, ... tokens, each the
        one that suits its draft; as far as known.
    carried: tokens that will be accepted of drafts of 0, 1, ... tokens from carried blocks, by
        guess. hits, carrying: the share of cycles that such blocks serve, by guess, and the seconds
        they add.
    """

    verify: Floats
    lead: float
    passes: Mapping[Source, Drafting]
    carried: Mapping[Guess, Floats]
    hits: Mapping[Guess, float]
    carrying: float
    trees: Mapping[Source, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Values:
    """Worth at a rate, in tokens.

    plain, lead, drafting: of a cycle without a draft, done plainly, with a block alongside, after a
        draft pass of `source` for `width` tokens, of which `nodes` are verified; branches: as a
        tree, with which no block rides.
    gain: of a draft at hand, by the guess that led to it. onward: of the blocks carried in a cycle,
        less their time. block: of the time of one block.
    """

    plain: float
    lead: float
    drafting: float
    source: Source | None
    width: int
    nodes: int
    branches: bool
    gain: Mapping[Guess, float]
    onward: float
    block: float


def values(estimates: Estimates, rate: float) -> Values:
    """See `Values`."""
    e = estimates
    times = rate * e.verify[1:]
    chains = {
        guess: float(np.max(n + 1 - times[: len(n)], initial=-np.inf))
        for guess, n in e.carried.items()
    }
    trees = {guess: _tree(e, SOURCES[guess], times)[0] for guess in e.carried}
    onward = _onward(e, rate, chains, trees)
    gain = {guess: max(chain + onward, trees[guess]) for guess, chain in chains.items()}
    plain = 1 - rate * float(e.verify[1])
    drafting, source, width, nodes, branches = -np.inf, None, 0, 0, False
    for candidate, d in e.passes.items():
        of_pass = rate * d.seconds
        worth = d.tokens + 1 - times[1 : len(d.tokens) + 1] - of_pass
        worth[d.widths == np.arange(1, len(worth) + 1)] += onward
        best = int(np.argmax(worth))
        if worth[best] > drafting:
            drafting, source = float(worth[best]), candidate
            width, nodes = int(d.widths[best]), best + 1
            branches = width != nodes
        # Which tokens a tree takes is settled when they are there: as many are drafted as are worth
        # their own rows.
        wide = int(np.argmax(d.tokens - of_pass))
        tree, count = _tree(e, candidate, times)
        if tree - of_pass[wide] > drafting:
            drafting, source = tree - float(of_pass[wide]), candidate
            width, nodes, branches = int(d.widths[wide]), count, True
    return Values(
        plain=plain,
        lead=plain - rate * e.lead + gain[Guess.LAST],
        drafting=drafting,
        source=source,
        width=width,
        nodes=nodes,
        branches=branches,
        gain=gain,
        onward=onward,
        block=rate * e.lead,
    )


def _tree(e: Estimates, source: Source, times: Floats) -> tuple[float, int]:
    """What a draft of this source is worth as the tree that suits it, and the nodes of that."""
    promised = e.trees.get(source)
    if promised is None:
        return -np.inf, 0
    worth = promised + 1 - times[1 : len(promised) + 1]
    best = int(np.argmax(worth))
    return float(worth[best]), best + 1


def _onward(
    e: Estimates,
    rate: float,
    chains: Mapping[Guess, float],
    trees: Mapping[Guess, float],
) -> float:
    """What the blocks carried in a cycle are worth, less their time.

    A block that comes true is verified as a tree, or as a chain that makes way for the next blocks,
    which are worth as much again; or it is ignored, if it promises nothing.
    """
    onward = 0.0
    for _ in range(len(Guess) + 1):  # as often as a guess may turn from one into the other
        tokens, again = -rate * e.carrying, 0.0
        for guess, chain in chains.items():
            if chain + onward > max(trees[guess], 0.0):
                tokens, again = tokens + e.hits[guess] * chain, again + e.hits[guess]
            else:
                tokens += e.hits[guess] * max(trees[guess], 0.0)
        onward = max(tokens, 0.0) / max(1 - again, 0.05)  # a geometric series
    return onward


def prospect(estimates: Estimates, *, blocks: int, width: int, near: float = 0.0) -> Prospect:
    """The rate, and the strategy that promises it. blocks, width: of carried blocks, as they have
    been. near: the rate that was found last, if any."""
    plain = 1 / float(estimates.verify[1])

    def surplus(rate: float) -> float:
        found = values(estimates, rate)
        return max(found.lead, found.drafting)

    rate = _root(surplus, plain, plain * len(estimates.verify), near)
    if rate < MARGIN * plain:
        return Prospect(PLAIN, plain)
    found = values(estimates, rate)
    if found.lead > found.drafting or (found.onward > 0 and not found.branches):
        return Prospect(Plan(Strategy.FUSED, width, blocks), rate, found.source)
    tree = found.nodes if found.branches else 0
    return Prospect(Plan(Strategy.TWO_PASS, found.width, tree=tree), rate, found.source)


def _root(falling: Callable[[float], float], low: float, high: float, near: float) -> float:
    """Where a falling function is 0, to one part in a thousand; `low` if it is negative there.

    near: where it may be. The largest of falling lines falls ever less steeply, so a line through
    two points in front of the root meets 0 in front of it, too: a few steps will do. Where it does
    not (worth carried onward is no line), the root is between two points, and halves are taken.
    """
    value = falling(low)
    if value <= 0:
        return low
    at = near if low < near < high else 1.2 * low
    while high > 1.001 * low:
        found = falling(at)
        if found > 0:
            slope = (value - found) / (at - low)
            low, value = at, found
            at = low + max(value / slope, 0.0005 * low) if slope > 0 else high
        else:
            high = at
        if not low < at < high:
            at = (low * high) ** 0.5
    return low


def best_width(
    carried: Mapping[Guess, Floats],
    hits: Mapping[Guess, float],
    verify: Floats,
    rate: float,
    carrying: Callable[[int], float],
) -> int:
    """Draft tokens that carried blocks had best bring.

    carried: as in `Estimates`. carrying: seconds of passes whose blocks bring so many.
    """
    length = len(carried[Guess.NEXT])
    best = np.zeros(length)
    for guess, n in carried.items():
        best += hits[guess] * np.maximum.accumulate(n + 1 - rate * verify[1 : length + 1])
    # The optimum is flat: eight or so widths are enough.
    widths = range(min(3, length - 1), length, max((length - 1) // 8, 1))
    return max(widths, key=lambda width: float(best[width]) - rate * carrying(width))
