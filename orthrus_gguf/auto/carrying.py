"""Blocks carried by verify passes: which guesses to carry, and how such blocks have fared."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import field

from orthrus_gguf.drafting.cycle import Cycle, Guess, Hypothesis
from orthrus_gguf.records import dataclass

#: Weight of the newest cycle.
NEWEST = 0.05

#: Share of cycles that a block of either guess is taken to serve before anything is known.
HITS = 0.3

#: Blocks that promise fewer tokens are not looked at.
LEAST = 0.005


@dataclass
class Carrying:
    """Running means over the cycles that verified a draft and carried blocks.

    rows: verified. blocks: carried. seconds: that they added. hits: by guess, the share of cycles
    that left a block whose guess came true (the better one, if both did).
    """

    rows: float
    blocks: float
    seconds: float
    hits: dict[Guess, float] = field(default_factory=lambda: dict.fromkeys(Guess, HITS))

    def observe(self, cycle: Cycle, seconds: float) -> None:
        """Learn from a cycle, whose blocks added `seconds`."""
        true = {guess.guess for guess in cycle.guesses if guess.is_true(cycle)}
        best = Guess.NEXT if Guess.NEXT in true else Guess.LAST if true else None
        for guess in Guess:
            self.hits[guess] += NEWEST * ((guess is best) - self.hits[guess])
        self.rows += NEWEST * (len(cycle.drafts) + 1 - self.rows)
        self.blocks += NEWEST * (len(cycle.guesses) - self.blocks)
        self.seconds += NEWEST * (seconds - self.seconds)


def by_worth(
    guesses: Iterable[Hypothesis], last: float, following: float
) -> Iterator[tuple[Hypothesis, float]]:
    """Guesses, each with the expected tokens that it adds to those before it: greedily the most.

    last, following: what a draft under guess A and under guess B is worth. When both come true, the
    better one counts.
    """
    alone = {Guess.LAST: last, Guess.NEXT: following}
    # For one outcome there may be a guess of either kind; B comes true only if A does.
    second = {Guess.LAST: last, Guess.NEXT: max(following - last, 0.0)}
    waiting = []
    for i, guess in enumerate(guesses):
        tokens = guess.probability * alone[guess.guess]
        if tokens > LEAST:
            waiting.append((-tokens, i, guess))
    heapq.heapify(waiting)
    chosen: dict[int, Hypothesis] = {}  # by outcome, the first one
    while waiting:
        _, i, guess = heapq.heappop(waiting)
        other = chosen.get(guess.accepted)
        if other is None:
            more = guess.probability * alone[guess.guess]
        else:
            more = guess.probability * second[guess.guess]
            if guess.guess is Guess.LAST:  # where both come true, only one of them counts
                more -= other.probability * min(last, following)
        if more <= LEAST:
            continue
        if waiting and -more > waiting[0][0]:  # worth less than it was: not its turn yet
            heapq.heappush(waiting, (-more, i, guess))
            continue
        chosen.setdefault(guess.accepted, guess)
        yield guess, more
