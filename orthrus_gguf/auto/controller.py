"""The controller behind `--strategy auto`: what to do next, so that tokens come fastest.

Everything is measured in expected tokens per second. From the cost of passes (`costs.py`) and the
acceptance of drafts (`acceptance.py`) follows the going rate (`outlook.py`). A choice within a
cycle is then worth its expected tokens less what its time would have brought at the going rate; the
best choice wins. Plain decoding is always among them.

Two accounts keep the promise "never slower than plain decoding": estimates may be wrong, so time
lost to drafts, beside plain decoding by the same clock, may not exceed a small share of all time;
and what was given up is forgotten slowly, so that it is tried again when the text changes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from orthrus_gguf.auto.acceptance import Acceptance, sums
from orthrus_gguf.auto.carried_blocks import Riding, by_worth
from orthrus_gguf.auto.costs import Costs
from orthrus_gguf.auto.rate import (
    MARGIN,
    NO_HEADS,
    Estimates,
    Floats,
    Outlook,
    Values,
    best_width,
    outlook,
    values,
)
from orthrus_gguf.drafting.draft import NO_DRAFT, Draft, Guess, Hypothesis, Source, hypotheses
from orthrus_gguf.drafting.policy import MAX_LOOKUP, Cycle, Pass, Plan, Strategy, block_rows

#: Blocks that ride in one pass at most.
MAX_BLOCKS = 8

#: Time that drafts may lose against plain decoding: a share of all time, and at first as many
#: single-row passes.
LOSS_SHARE, LOSS_CREDIT = 0.015, 2.0

#: Weight of the newest cycle in what the host takes beside a pass.
NEWEST_HOST = 0.1

#: Going rate and tables of costs are computed anew after this many cycles.
REFRESH = 8

#: What statistics keep per cycle of plain decoding (half is gone after 140).
RELAX = 0.995

#: Where drafts cannot pay, cycles of plain decoding are counted, and learned from together after
#: this many: on a small model a cycle takes a few hundred microseconds, and thinking about each
#: would cost a tenth of that.
IDLE = 128

#: A lookup must promise this much more than its time, since what it takes on the host counts too.
#: None are made where even a perfect one would not bring the second factor: where a row among many
#: costs nearly what it costs alone.
LOOKUP_MARGIN, LOOKUP_WORTH = 1.1, 1.3


@dataclass
class Phase:
    """Consecutive cycles under one outlook, for `--explain`."""

    outlook: Outlook
    cycles: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Tables:
    """verify: seconds of AR passes of 0, 1, ... rows at the current context. values: of choices at
    the going rate. rider: draft tokens that blocks which ride along are to bring. mixed: seconds of
    passes with both views, as far as they were asked for. idle: nothing pays but plain decoding,
    and what costs no pass."""

    verify: list[float]
    going: Outlook
    values: Values
    rider: int
    context: int
    idle: bool
    mixed: dict[tuple[int, int], float] = field(default_factory=dict)


class Controller:
    """A `Policy` that learns. Keep one per session, so that it goes on knowing what it learned."""

    def __init__(self, costs: Costs, block_size: int | None, *, lookup: bool = True) -> None:
        """block_size: of the diffusion heads; None without heads."""
        self._lookup_wanted = lookup
        self.phases: list[Phase] = []
        self._costs = costs
        self._block = block_size or 0
        self._widest = max(self._block, MAX_LOOKUP if lookup else 0)
        self._acceptance = Acceptance(max(self._widest, 1))
        self._riding: Riding | None = None
        self._added = 0.0
        self._lost = self._elapsed = self._host = 0.0
        self._tables: _Tables | None = None
        self._age = 0
        self._idle_cycles, self._idle_seconds = 0, 0.0

    @property
    def lookup(self) -> bool:
        """Whether looking up can pay here."""
        if not self._lookup_wanted:
            return False
        verify = self._current(0).verify
        best = max((rows * verify[1]) / verify[rows] for rows in range(2, len(verify)))
        return best >= LOOKUP_WORTH

    def choose(self, offers: Sequence[Draft], room: int, context: int) -> Draft | int:
        tables = self._current(context)
        if tables.idle and not offers:
            return NO_DRAFT
        rate, worth = tables.going.rate, tables.values
        for offer in offers:
            self._acceptance.foresee(offer)
        if room == 0 or self._overdrawn(tables):
            return NO_DRAFT
        best: Draft | int = NO_DRAFT
        value = max(worth.plain + MARGIN - 1, worth.lead)
        for offer in offers:
            accept = self._acceptance.of_draft(offer, min(room, self._widest))
            charge = rate * (LOOKUP_MARGIN if offer.source is Source.LOOKUP else 1.0)
            expected = sums(accept)[: self._most(tables) + 1]
            offered = max(n + 1 - charge * tables.verify[i + 1] for i, n in enumerate(expected))
            # A refused draft is no loss where a block rides along on that guess.
            offered += max(worth.onward, (1 - accept[0]) * worth.gain[Guess.LAST] - worth.rider)
            if offered > value:
                best, value = offer, offered
        if self._block and worth.drafting > value:
            best = min(worth.width, room) + 1
        return best

    def shape(
        self, draft: Draft, anchor: int, room: int, context: int
    ) -> tuple[int, Sequence[Hypothesis]]:
        tables = self._current(context)
        if tables.idle and not draft.tokens:
            return 0, ()
        rate = tables.going.rate
        accept = self._acceptance.of_draft(draft, min(room, self._widest))
        expected = sums(accept)[: self._most(tables) + 1]
        worth = [n - rate * tables.verify[i + 1] for i, n in enumerate(expected)]
        width = max(range(len(worth)), key=worth.__getitem__)
        self._added = 0.0
        if not self._block or self._overdrawn(tables):
            return width, ()
        return width, self._choose_riders(tables, draft, anchor, width, room)

    def steady(self, context: int) -> Plan:
        tables = self._current(context)
        plain = Plan(Strategy.AR, 0)
        return plain if self._overdrawn(tables) else replace(tables.going.plan, lookup=False)

    def observe(self, cycle: Cycle) -> None:
        tables = self._current(cycle.start)
        self._elapsed += cycle.seconds
        self._record(tables.going, cycle)
        if tables.idle and not cycle.drafts and len(cycle.passes) == 1:
            (done,) = cycle.passes
            self._host += NEWEST_HOST * (cycle.seconds - done.seconds - self._host)
            self._idle_cycles += 1
            self._idle_seconds += done.seconds
            if self._idle_cycles >= IDLE:
                self._learn_idle(cycle.start)
            return
        self._learn(cycle, tables)

    def _learn_idle(self, context: int) -> None:
        """Learn from the cycles of plain decoding that were only counted."""
        cycles, seconds = self._idle_cycles, self._idle_seconds
        self._idle_cycles, self._idle_seconds = 0, 0.0
        self._costs.observe(Pass(1, 0, context, seconds / cycles))
        self._acceptance.relax(RELAX**cycles)
        self._age = REFRESH

    def _learn(self, cycle: Cycle, tables: _Tables) -> None:
        self._acceptance.observe(cycle)
        for done in cycle.passes:
            self._costs.observe(done)
        if not cycle.drafts:
            self._acceptance.relax(RELAX)
        elif self._riding is not None and cycle.guesses:
            self._riding.observe(cycle, self._added)
        if len(cycle.passes) > 1 or cycle.drafts or cycle.guesses:
            plain = tables.verify[1] + self._host
            self._lost += cycle.seconds - len(cycle.tokens) * plain
        self._age += 1

    def _first_riding(self, context: int) -> Riding:
        """What is taken to be usual before any block has ridden: two blocks of half the size."""
        rows = max(self._block // 4, 1)
        more = self._costs.seconds(rows, self._block, context)
        more -= self._costs.seconds(rows, 0, context)
        return Riding(float(rows), 2.0, more)

    def _record(self, going: Outlook, cycle: Cycle) -> None:
        phase = self.phases[-1] if self.phases else None
        if phase is None or (phase.outlook is not going and phase.outlook.plan != going.plan):
            phase = Phase(going)
            self.phases.append(phase)
        phase.cycles += 1
        phase.tokens += len(cycle.tokens)
        phase.seconds += cycle.seconds

    def _credit(self, tables: _Tables) -> float:
        """Seconds that drafts may yet lose."""
        return LOSS_CREDIT * tables.verify[1] + LOSS_SHARE * self._elapsed - self._lost

    def _most(self, tables: _Tables) -> int:
        """The most draft tokens to verify: rows that turn out wasted may cost no more than the
        credit, or a plain pass."""
        alone = tables.verify[1]
        return bisect_right(tables.verify, alone + max(self._credit(tables), alone)) - 2

    def _overdrawn(self, tables: _Tables) -> bool:
        return self._credit(tables) < 0

    def _choose_riders(
        self, tables: _Tables, draft: Draft, anchor: int, width: int, room: int
    ) -> list[Hypothesis]:
        """Blocks that are worth their rows, the most promising first."""
        accept = self._acceptance.of_draft(draft, width + 1)
        last, next_ = tables.values.gain[Guess.LAST], tables.values.gain[Guess.NEXT]
        alone, most = tables.verify[width + 1], self._credit(tables)
        chosen: list[Hypothesis] = []
        rows, tokens, best, count = 0, 0.0, 0.0, 0
        self._added = 0.0
        for guess, more in by_worth(hypotheses(draft, width, accept, anchor), last, next_):
            size = min(block_rows(guess, tables.rider, room), self._block)
            if size == 0:
                continue
            rows, tokens = rows + size, tokens + more
            seconds = self._pass_seconds(tables, width + 1, rows) - alone
            if seconds > most or len(chosen) == MAX_BLOCKS:
                break
            chosen.append(replace(guess, rows=size))
            # The first block of a pass is dear, more are cheap: the best number of them counts.
            if tokens - tables.going.rate * seconds > best:
                best, count = tokens - tables.going.rate * seconds, len(chosen)
                self._added = seconds
        return chosen[:count]

    def _pass_seconds(self, tables: _Tables, ar_rows: int, diffusion_rows: int) -> float:
        """The cost of a pass at the context of `tables`."""
        key = ar_rows, diffusion_rows
        if key not in tables.mixed:
            tables.mixed[key] = self._costs.seconds(*key, tables.context)
        return tables.mixed[key]

    def _current(self, context: int) -> _Tables:
        if self._tables is None or self._age >= REFRESH:
            self._tables, self._age = self._refresh(context), 0
        return self._tables

    def _refresh(self, context: int) -> _Tables:
        """Costs and acceptance now → the going rate, and the worth of choices."""
        seconds, block = self._costs.seconds, self._block
        rows = range(1, self._widest + 2)
        # More rows never cost less, whatever was measured.
        verify = np.maximum.accumulate([0.0, *(seconds(count, 0, context) for count in rows)])
        if not block:
            plain = Outlook(Plan(Strategy.AR, 0, lookup=self._lookup_wanted), 1 / verify[1])
            return _Tables(verify.tolist(), plain, NO_HEADS, 0, context, idle=True)
        riding = self._riding = self._riding or self._first_riding(context)
        carried = {
            Guess.LAST: np.array(self._expected(Source.LAST)),
            Guess.NEXT: np.array(self._expected(Source.NEXT)),
        }
        width = self._rider_width(riding, carried, verify, context)
        drafted = [min(count + 1, block) for count in range(1, block + 1)]
        estimates = Estimates(
            verify=verify,
            draft=np.array([0.0, *(seconds(0, count, context) for count in drafted)]),
            lead=seconds(1, min(width + 2, block), context) - verify[1],
            block=np.array(self._expected(Source.BLOCK)),
            carried={guess: n[: width + 1] for guess, n in carried.items()},
            hits=riding.hits,
            riding=riding.seconds,
        )
        going = outlook(
            estimates, blocks=max(round(riding.blocks), 1), width=width, lookup=self._lookup_wanted
        )
        worth = values(estimates, going.rate)
        idle = max(worth.drafting, worth.lead) <= worth.plain + MARGIN - 1
        return _Tables(verify.tolist(), going, worth, width, context, idle)

    def _expected(self, source: Source) -> list[float]:
        return sums(self._acceptance.of_source(source, self._block))

    def _rider_width(
        self, riding: Riding, carried: Mapping[Guess, Floats], verify: Floats, context: int
    ) -> int:
        """See `best_width`; at the going rate that was found last."""
        rows, blocks = round(riding.rows), max(riding.blocks, 1.0)
        rate = self._tables.going.rate if self._tables is not None else 1 / float(verify[1])

        def seconds(width: int) -> float:
            return self._costs.seconds(rows, round(blocks * (width + 1)), context)

        return best_width(carried, riding.hits, verify, rate, seconds)
