"""The controller behind `--strategy auto`: what to do next, so that tokens come fastest.

Everything is measured in expected tokens per second. From the cost of passes (`costs.py`) and the
acceptance of drafts (`acceptance.py`) follows the best rate that a steady strategy would reach, the
*going rate*. A choice within a cycle is then worth its expected tokens less what its time would
have brought at the going rate; the best choice wins. Plain decoding is always among them.

Two accounts keep the promise "never slower than plain decoding": estimates may be wrong, so time
lost to drafts, beside plain decoding by the same clock, may not exceed a small share of all time;
and what was given up is forgotten slowly, so that it is tried again when the text changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orthrus_gguf.acceptance import Acceptance, sums
from orthrus_gguf.costs import Costs
from orthrus_gguf.drafts import NO_DRAFT, Draft, Guess, Hypothesis, Source, hypotheses
from orthrus_gguf.policy import Cycle, Plan, Strategy, block_rows

#: Blocks that ride in one pass at most, and the largest number of draft tokens from a lookup.
MAX_BLOCKS = 4
MAX_LOOKUP = 32

#: Time that drafts may lose against plain decoding: a share of all time, and at first as many
#: single-row passes.
LOSS_SHARE, LOSS_CREDIT = 0.015, 1.0

#: A plan must promise this much more than plain decoding to be preferred to it.
MARGIN = 1.02

#: Going rate and tables of costs are computed anew after this many cycles.
REFRESH = 8

#: What statistics keep per cycle of plain decoding (half is gone after 140).
RELAX = 0.995


@dataclass(frozen=True)
class Outlook:
    """A steady strategy and what it promises, in tokens per second."""

    plan: Plan
    rate: float


@dataclass
class Phase:
    """Consecutive cycles under one outlook, for `--explain`."""

    outlook: Outlook
    cycles: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Tables:
    """Costs at the current context, and the values that choices are weighed by.

    verify, draft: seconds of passes of 0, 1, ... rows. gain: by guess, the tokens that a cycle with
    a draft from a carried block brings beyond one without. lead: what plain decoding gains by a
    block that rides with its row.
    """

    verify: list[float]
    draft: list[float]
    going: Outlook
    gain: dict[Guess, float]
    lead: float


class Controller:
    """A `Policy` that learns. Keep one per session, so that it goes on knowing what it learned."""

    def __init__(self, costs: Costs, block_size: int | None, *, lookup: bool = True) -> None:
        """block_size: of the diffusion heads; None without heads."""
        self.lookup = lookup
        self.phases: list[Phase] = []
        self._costs = costs
        self._block = block_size or 0
        self._widest = max(self._block, MAX_LOOKUP if lookup else 0)
        self._acceptance = Acceptance(max(self._widest, 1))
        self._hits = [0.5] * (MAX_BLOCKS + 1)
        self._lost = self._elapsed = 0.0
        self._tables: _Tables | None = None
        self._age = 0

    def choose(self, offers: Sequence[Draft], room: int, context: int) -> Draft | int:
        tables = self._current(context)
        rate = tables.going.rate
        for offer in offers:
            self._acceptance.foresee(offer)
        if room == 0 or self._overdrawn(tables):
            return NO_DRAFT
        best: Draft | int = NO_DRAFT
        value = 1 - rate * tables.verify[1] + tables.lead
        for offer in offers:
            expected = sums(self._acceptance.of_draft(offer, min(room, self._widest)))
            offered = max(n + 1 - rate * tables.verify[i + 1] for i, n in enumerate(expected))
            offered += self._carried(tables)
            if offered > value:
                best, value = offer, offered
        width, drafted = self._draft_pass(tables, room)
        if drafted > value:
            best = min(width + 1, self._block)
        return best

    def shape(
        self, draft: Draft, anchor: int, room: int, context: int
    ) -> tuple[int, Sequence[Hypothesis]]:
        tables = self._current(context)
        rate = tables.going.rate
        accept = self._acceptance.of_draft(draft, min(room, self._widest))
        values = [n - rate * tables.verify[i + 1] for i, n in enumerate(sums(accept))]
        width = max(range(len(values)), key=values.__getitem__)
        if self._overdrawn(tables) or max(tables.gain.values()) <= 0:
            return width, ()
        return width, self._riders(tables, draft, anchor, width, room, context)

    def observe(self, cycle: Cycle) -> None:
        self._acceptance.observe(cycle)
        seconds = sum(done.seconds for done in cycle.passes)
        for done in cycle.passes:
            self._costs.observe(done)
        tables = self._current(cycle.start)
        if cycle.guesses:
            hit = any(
                guess.accepted == cycle.accepted
                and (guess.guess is Guess.LAST or guess.anchor == cycle.tokens[-1])
                for guess in cycle.guesses
            )
            count = len(cycle.guesses)
            self._hits[count] += 0.05 * (hit - self._hits[count])
        if not cycle.drafts:
            self._acceptance.relax(RELAX)
        self._elapsed += seconds
        if len(cycle.passes) > 1 or cycle.drafts or cycle.guesses:
            self._lost += seconds - len(cycle.tokens) * tables.verify[1]
        self._age += 1
        self._record(tables.going, cycle, seconds)

    def _record(self, going: Outlook, cycle: Cycle, seconds: float) -> None:
        if not self.phases or self.phases[-1].outlook.plan != going.plan:
            self.phases.append(Phase(going))
        phase = self.phases[-1]
        phase.cycles += 1
        phase.tokens += len(cycle.tokens)
        phase.seconds += seconds

    def _overdrawn(self, tables: _Tables) -> bool:
        """Whether drafts have lost as much time as they may."""
        return self._lost > LOSS_CREDIT * tables.verify[1] + LOSS_SHARE * self._elapsed

    def _draft_pass(self, tables: _Tables, room: int) -> tuple[int, float]:
        """Best width of a draft pass now, and the value of drafting and verifying it."""
        most = min(room, self._block)
        if most < 1:
            return 0, float("-inf")
        expected = sums(self._acceptance.of_source(Source.BLOCK, most))
        rate = tables.going.rate

        def value(width: int) -> float:
            seconds = tables.draft[min(width + 1, self._block)] + tables.verify[width + 1]
            return expected[width] + 1 - rate * seconds

        width = max(range(1, most + 1), key=value)
        return width, value(width) + self._carried(tables)

    def _carried(self, tables: _Tables) -> float:
        """What blocks that ride in a verify pass may bring, by the blocks that the plan has."""
        return tables.gain[Guess.NEXT] * self._hits[tables.going.plan.blocks] / 2

    def _riders(
        self, tables: _Tables, draft: Draft, anchor: int, width: int, room: int, context: int
    ) -> list[Hypothesis]:
        """Blocks that are worth their rows, the most promising first."""
        planned = tables.going.plan.width or self._block - 1
        accept = self._acceptance.of_draft(draft, width + 1)
        guesses = [
            replace(guess, rows=min(rows, self._block))
            for guess in hypotheses(draft, width, accept, anchor)
            if (rows := block_rows(guess, planned, room)) > 0
        ]
        chosen: list[Hypothesis] = []
        rows, seconds = 0, tables.verify[width + 1]
        served = [0.0] * (width + 1)  # by outcome, tokens that the chosen blocks promise
        while guesses and len(chosen) < MAX_BLOCKS:
            best = max(guesses, key=lambda guess: _more(guess, tables, served))
            time = self._costs.seconds(width + 1, rows + best.rows, context)
            more = _more(best, tables, served)
            if more <= tables.going.rate * (time - seconds):
                break
            guesses.remove(best)
            chosen.append(best)
            served[best.accepted] += more
            rows, seconds = rows + best.rows, time
        return chosen

    @property
    def _worth_of_last(self) -> float:
        """Accepted tokens of a draft under guess A beside one under guess B."""
        next_, last = (
            sums(self._acceptance.of_source(source, self._block))[-1]
            for source in (Source.NEXT, Source.LAST)
        )
        return min(last / next_, 1.0)

    def _current(self, context: int) -> _Tables:
        if self._tables is None or self._age >= REFRESH:
            self._tables, self._age = self._refresh(context), 0
        return self._tables

    def _refresh(self, context: int) -> _Tables:
        """Costs and acceptance now → the going rate, and the worth of a free draft."""
        seconds, most = self._costs.seconds, self._widest + 1
        verify = [0.0, *(seconds(rows, 0, context) for rows in range(1, most + 1))]
        draft = [0.0, *(seconds(0, rows, context) for rows in range(1, self._block + 1))]
        plain = Outlook(Plan(Strategy.AR, 0, lookup=self.lookup), 1 / verify[1])
        if not self._block:
            return _Tables(verify, draft, plain, dict.fromkeys(Guess, 0.0), 0.0)
        two_pass = self._two_pass(verify, draft)
        fused = self._fused(verify, draft, context)
        going = max(two_pass, fused, key=lambda outlook: outlook.rate)
        if going.rate < MARGIN * plain.rate:
            going = plain
        gain, lead = self._gains(verify, draft, going, context)
        return _Tables(verify, draft, going, gain, lead)

    def _two_pass(self, verify: Sequence[float], draft: Sequence[float]) -> Outlook:
        expected = sums(self._acceptance.of_source(Source.BLOCK, self._block))

        def rate(width: int) -> float:
            rows = min(width + 1, self._block)
            return (expected[width] + 1) / (draft[rows] + verify[width + 1])

        width = max(range(1, self._block + 1), key=rate)
        return Outlook(Plan(Strategy.TWO_PASS, width), rate(width))

    def _fused(self, verify: Sequence[float], draft: Sequence[float], context: int) -> Outlook:
        """The best steady mix of verify passes that carry blocks, and draft passes after misses."""
        block = sums(self._acceptance.of_source(Source.BLOCK, self._block))
        carried = sums(self._acceptance.of_source(Source.NEXT, self._block))
        worth = self._worth_of_last

        def rate(width: int, blocks: int) -> float:
            hit = self._hits[blocks]
            rows = min(width + 1, self._block)
            tokens = 1 + (1 - hit) * block[width] + hit * carried[width] * (1 + worth) / 2
            time = self._costs.seconds(width + 1, blocks * rows, context) + (1 - hit) * draft[rows]
            return tokens / time

        step = max(self._block // 8, 1)  # the optimum is flat, and every pair costs a look-up
        widths = range(min(3, self._block), self._block + 1, step)
        pairs = [(width, blocks) for width in widths for blocks in range(1, MAX_BLOCKS + 1)]
        width, blocks = max(pairs, key=lambda pair: rate(*pair))
        return Outlook(Plan(Strategy.FUSED, width, blocks), rate(width, blocks))

    def _gains(
        self, verify: Sequence[float], draft: Sequence[float], going: Outlook, context: int
    ) -> tuple[dict[Guess, float], float]:
        """See `_Tables`."""
        rate = going.rate

        def best(source: Source, *, drafting: bool = False) -> float:
            expected = sums(self._acceptance.of_source(source, self._block))
            return max(
                n + 1 - rate * (verify[i + 1] + drafting * draft[min(i + 1, self._block)])
                for i, n in enumerate(expected)
            )

        without = max(best(Source.BLOCK, drafting=True), 1 - rate * verify[1])
        gain = {Guess.NEXT: best(Source.NEXT) - without, Guess.LAST: best(Source.LAST) - without}
        rows = min((going.plan.width or self._block - 1) + 2, self._block)
        riding = self._costs.seconds(1, rows, context)
        led = 1 - rate * riding + gain[Guess.LAST]
        better = max(led - without, 0.0)
        gain = {guess: max(value - better, 0.0) for guess, value in gain.items()}
        return gain, max(gain[Guess.LAST] - rate * (riding - verify[1]), 0.0)


def _more(guess: Hypothesis, tables: _Tables, served: Sequence[float]) -> float:
    """Expected tokens that this block adds to what chosen ones promise for the same outcome."""
    tokens = guess.probability * tables.gain[guess.guess]
    if guess.guess is Guess.LAST:  # serves whenever the outcome comes true, like no other
        return max(tokens - served[guess.accepted], 0.0)
    if served[guess.accepted]:  # beside a block under guess A, only the difference counts
        better = tables.gain[Guess.NEXT] - tables.gain[Guess.LAST]
        return guess.probability * max(better, 0.0)
    return tokens
