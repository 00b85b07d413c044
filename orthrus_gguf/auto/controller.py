"""The controller behind `--strategy auto`: what to do next, so that tokens come fastest.

Everything is measured in expected tokens per second. From the cost of passes (`costs.py`) and the
acceptance of drafts (`acceptance.py`) follows the rate of steady decoding (`rate.py`). A choice
within a cycle is then worth its expected tokens less what its time would have brought at that rate;
the best choice wins. Plain decoding is always among them.

Two accounts keep the promise "never slower than plain decoding": estimates may be wrong, so time
lost to drafts, beside plain decoding by the same clock, may not exceed a small share of all time
(in the company of other sequences there is nothing to compare with, and nothing is counted), unless
the text shows that drafts would have won it back (`account.py`); and what was given up is forgotten
slowly, so that it is tried again when the text changes.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from orthrus_gguf.auto.acceptance import Acceptance, sums
from orthrus_gguf.auto.account import HELD_UP, Account, PlainCycles, Unverified
from orthrus_gguf.auto.carrying import Carrying, by_worth
from orthrus_gguf.auto.costs import Costs
from orthrus_gguf.auto.phases import Phase, record
from orthrus_gguf.auto.rate import (
    MARGIN,
    Drafting,
    Estimates,
    Floats,
    best_width,
    prospect,
    values,
)
from orthrus_gguf.auto.tables import Tables
from orthrus_gguf.auto.trees import MOST_NODES, Trees
from orthrus_gguf.drafting import registry
from orthrus_gguf.drafting.carried_blocks import SOURCES, hypotheses
from orthrus_gguf.drafting.cycle import Cycle, Guess, Hypothesis, Pass
from orthrus_gguf.drafting.draft import NO_DRAFT, Draft, Source
from orthrus_gguf.drafting.drafter import Drafter, DraftPass
from orthrus_gguf.drafting.plan import MOST_AT_HAND, block_rows
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.runtime.protocol import View

#: Blocks carried by one pass at most.
MAX_BLOCKS = 8

#: The rate and the tables of costs are computed anew after this many cycles.
REFRESH = 8

#: What the longest draft of a drafter's own network is taken to cost where it was not measured, in
#: single-row passes, until one has run; and the weight of the newest one.
NETWORK_GUESS, NEWEST = 0.4, 0.1

#: What statistics of a source keep per cycle of which it had no draft (half is gone after 140).
RELAX = 0.995

#: Where drafts do not pay, cycles of plain decoding are counted, and learned from together after
#: `REFRESH` of them, then twice as many, up to this: on a small model a cycle takes a few hundred
#: microseconds, and thinking about each would cost a tenth of that.
IDLE = 128

#: A draft that promises less than so many tokens more than plain decoding is left out each fourth
#: time. That costs next to nothing, and single rows are timed beside it: what hardly pays may not.
HARDLY, ALTERNATE = 0.15, 4

#: Drafts that cost no pass of their own, nor the host any time: the pass before brought them.
CARRIED = frozenset(SOURCES.values())

#: Drafters that take time on the host are not asked where even a perfect draft would not bring this
#: factor: where a row among many costs nearly what it costs alone.
PERFECT_MUST_BRING = 1.3


class Controller:
    """A `Policy` that learns. Keep one per session, so that it goes on knowing what it learned."""

    def __init__(
        self, costs: Costs, block_size: int | None, *, without: Iterable[str] = ()
    ) -> None:
        """block_size: of the diffusion heads; None without heads. without: drafters not to use."""
        self.phases: list[Phase] = []
        self._names = set(registry.KINDS) - set(without)
        self._costs = costs
        self._block = block_size or 0
        self._widest = max(self._block, MOST_AT_HAND)
        self._acceptance = Acceptance(self._widest)
        self._trees = Trees(self._acceptance, self._widest)
        self._passes: dict[Source, DraftPass] = {}
        self._networks: dict[Source, float] = {}  # seconds of their longest drafts
        self._carrying: Carrying | None = None
        self._added = 0.0
        self.account = Account()
        self._tables: Tables | None = None
        self._age, self._drafted = 0, set[Source]()
        self._unverified: Unverified | None = None
        self._plain = PlainCycles(REFRESH)
        self._hardly = 0

    def drafters(self, sequence: TokenSequence) -> list[Drafter]:
        verify = self._current(0).verify
        best = max((rows * verify[1]) / verify[rows] for rows in range(2, len(verify)))
        names = {
            name
            for name in self._names
            if registry.KINDS[name].margin <= 1 or best >= PERFECT_MUST_BRING
        }
        return registry.make_drafters(sequence, names)

    def choose(
        self, drafts: Sequence[Draft], passes: Sequence[DraftPass], room: int, context: int
    ) -> Draft | DraftPass:
        for offer in passes:
            if offer.source not in self._passes:
                self._passes[offer.source] = offer
                self._tables = None
        tables = self._current(context)
        if tables.idle and not drafts:
            return NO_DRAFT
        for draft in drafts:
            self._acceptance.foresee(draft)
        if room == 0:
            return NO_DRAFT
        if self._overdrawn(tables):
            if self._unverified is None:
                self._watch(self._best(drafts, (), tables, room), tables, context)
            # What a carried block left is paid for, and may yet earn that.
            drafts, passes = [draft for draft in drafts if draft.source in CARRIED], ()
        return self._best(drafts, passes, tables, room)

    def _best(
        self, drafts: Sequence[Draft], passes: Sequence[DraftPass], tables: Tables, room: int
    ) -> Draft | DraftPass:
        worth = tables.values
        best: Draft | DraftPass = NO_DRAFT
        plain = value = max(worth.plain + MARGIN - 1, worth.lead)
        for draft in drafts:
            offered = self._worth_of(draft, tables, room)
            if offered > value:
                best, value = draft, offered
        if worth.drafting > value:
            for offer in passes:
                if offer.source == worth.source:
                    best = offer.ordered(min(worth.width, room))
        elif plain < value < plain + HARDLY:
            self._hardly += 1
            if self._hardly % ALTERNATE == 0:
                return NO_DRAFT
        return best

    def _watch(self, draft: Draft | DraftPass, tables: Tables, context: int) -> None:
        """Find out what a draft would bring that there is no credit for."""
        if isinstance(draft, Draft) and draft.tokens and draft.source not in CARRIED:
            width = self._chain_width(draft, tables, len(draft))[0]
            seconds = tables.verify[width + 1]
            self._unverified = Unverified(context, draft.tokens[:width], seconds)

    def _chain_width(self, draft: Draft, tables: Tables, room: int) -> tuple[int, float]:
        """How many tokens of a draft had best be verified as a chain, and what they are worth."""
        accept = self._acceptance.of_draft(draft, min(room, self._widest))
        expected = sums(accept)[: self._most(tables) + 1]
        chain = _worths(expected, tables.steady.rate, tables.verify)
        width = max(range(len(chain)), key=chain.__getitem__)
        return width, chain[width]

    def _worth_of(self, draft: Draft, tables: Tables, room: int) -> float:
        """Tokens that a draft at hand is worth."""
        worth = tables.values
        charge = tables.steady.rate * draft.source.margin
        accept = self._acceptance.of_draft(draft, min(room, self._widest))
        expected = sums(accept)[: self._most(tables) + 1]
        offered = max(n + 1 - charge * tables.verify[i + 1] for i, n in enumerate(expected))
        # A refused draft is no loss where a carried block has taken that guess.
        return offered + max(worth.onward, (1 - accept[0]) * worth.gain[Guess.LAST] - worth.block)

    def shape(
        self, draft: Draft, anchor: int, room: int, context: int
    ) -> tuple[Tree, Sequence[Hypothesis]]:
        tables = self._current(context)
        self._added = 0.0
        if tables.idle and not draft.tokens:
            return Tree(()), ()
        rate, most = tables.steady.rate, self._most(tables)
        width, value = self._chain_width(draft, tables, room)
        guesses: list[Hypothesis] = []
        if self._block and not self._overdrawn(tables):
            guesses, added = self._carry(tables, draft, anchor, width, room)
            value += added
        if draft.second:
            accept = self._acceptance.of_draft(draft, min(room, self._widest))
            branches = self._trees.branches(draft, accept)
            reached = [0.0, *itertools.accumulate(branches.probabilities[:most])]
            tree = _worths(reached, rate, tables.verify)
            nodes = max(range(len(tree)), key=tree.__getitem__)
            if tree[nodes] > value:
                self._added = 0.0
                return draft.tree(branches, nodes), ()
        return Tree(draft.tokens[:width]), guesses

    def observe(self, cycle: Cycle) -> None:
        tables = self._current(cycle.start)
        record(self.phases, tables.steady, cycle)
        if self._unverified is not None:
            brought = self._unverified.brought(cycle)
            if brought is not None:
                if brought:
                    alone = tables.verify[1]
                    self.account.add_unverified(brought, self._unverified.seconds, alone)
                self._unverified = None
        if tables.idle and not cycle.drafts and len(cycle.passes) == 1:
            (done,) = cycle.passes
            if done.company:  # what others did on the host meanwhile is not known
                self._costs.observe(done)
                self._plain.add(None)
            else:
                self.account.add_plain(cycle, done.seconds)
                self._plain.add(done.seconds)
            if self._plain.count >= self._plain.due:
                self._learn_plain(cycle.start)
            return
        self._plain.due = REFRESH
        self._learn(cycle, tables)

    def _learn_plain(self, context: int) -> None:
        """Learn from the cycles of plain decoding that were only counted."""
        self._age = max(self._plain.count, REFRESH)
        alone, seconds = self._plain.taken(min(2 * self._plain.due, IDLE))
        if alone:
            self._costs.observe(Pass(1, 0, context, seconds), alone)

    def _learn(self, cycle: Cycle, tables: Tables) -> None:
        self._age += 1
        self._acceptance.observe(cycle)
        expected = 0.0
        for done in cycle.passes:
            if done.drafter_rows:
                expected += done.seconds
                self._observe_network(cycle.draft.source, done)
            else:
                expected += self._pass_seconds(tables, done.ar_rows, done.diffusion_rows)
                self._costs.observe(done)
        if cycle.drafts:
            self._drafted.add(cycle.draft.source)
        if cycle.drafts and self._carrying is not None and cycle.guesses:
            self._carrying.observe(cycle, self._added)
        if any(done.company for done in cycle.passes):
            return  # plain decoding in this company would have taken nobody knows how long
        self.account.add(cycle, expected, tables.verify[1])

    def _observe_network(self, source: Source, done: Pass) -> None:
        """Learn what the longest draft of a network takes, of a pass that it had for itself."""
        if not (done.company or done.ar_rows or done.diffusion_rows):
            offer = self._passes.get(source)
            seconds = done.seconds
            if offer is not None:
                seconds *= offer.rows(offer.most) / done.drafter_rows
            known = self._networks.get(source, self._costs.drafter or seconds)
            newest = min(seconds, HELD_UP * known)
            self._networks[source] = known + NEWEST * (newest - known)

    def _first_carrying(self, context: int) -> Carrying:
        """What is taken to be usual before any block was carried: two blocks of half the size."""
        rows = max(self._block // 4, 1)
        more = self._costs.seconds(rows, self._block, context)
        more -= self._costs.seconds(rows, 0, context)
        return Carrying(float(rows), 2.0, more)

    def _credit(self, tables: Tables) -> float:
        """Seconds that drafts may yet lose."""
        return self.account.credit(tables.verify[1])

    def _most(self, tables: Tables) -> int:
        """The most draft tokens to verify: rows that turn out wasted may cost no more than the
        credit, or a plain pass."""
        alone = tables.verify[1]
        return bisect_right(tables.verify, alone + max(self._credit(tables), alone)) - 2

    def _overdrawn(self, tables: Tables) -> bool:
        return self._credit(tables) < 0

    def _carry(
        self, tables: Tables, draft: Draft, anchor: int, width: int, room: int
    ) -> tuple[list[Hypothesis], float]:
        """Blocks that are worth their rows, the most promising first, and what they are worth."""
        accept = self._acceptance.of_draft(draft, width + 1)
        last, next_ = tables.values.gain[Guess.LAST], tables.values.gain[Guess.NEXT]
        alone, most = tables.verify[width + 1], self._credit(tables)
        chosen: list[Hypothesis] = []
        rows, tokens, best, count = 0, 0.0, 0.0, 0
        for guess, more in by_worth(hypotheses(draft, width, accept, anchor), last, next_):
            size = min(block_rows(guess, tables.carried, room), self._block)
            if size == 0:
                continue
            rows, tokens = rows + size, tokens + more
            seconds = self._pass_seconds(tables, width + 1, rows) - alone
            if seconds > most or len(chosen) == MAX_BLOCKS:
                break
            chosen.append(guess.sized(size))
            # The first block of a pass is dear, more are cheap: the best number of them counts.
            if tokens - tables.steady.rate * seconds > best:
                best, count = tokens - tables.steady.rate * seconds, len(chosen)
                self._added = seconds
        return chosen[:count], best

    def _pass_seconds(self, tables: Tables, ar_rows: int, diffusion_rows: int) -> float:
        """The cost of a pass at the context of `tables`."""
        key = ar_rows, diffusion_rows
        if key not in tables.mixed:
            tables.mixed[key] = self._costs.seconds(*key, tables.context)
        return tables.mixed[key]

    def _current(self, context: int) -> Tables:
        if self._tables is None or self._age >= REFRESH:
            self._acceptance.relax(RELAX**self._age, self._drafted)
            self._drafted.clear()
            self._tables, self._age = self._refresh(context), 0
        return self._tables

    def _refresh(self, context: int) -> Tables:
        """Costs and acceptance now → the rate, and the worth of choices."""
        seconds, block = self._costs.seconds, self._block
        rows = range(1, max(self._widest, MOST_NODES) + 2)
        # Fewer rows never cost more, whatever was measured: what is held up takes longer, not less.
        verify = np.array([0.0, *(seconds(count, 0, context) for count in rows)])
        verify = np.minimum.accumulate(verify[::-1])[::-1]
        carried: dict[Guess, Floats] = {guess: np.zeros(0) for guess in Guess}
        hits, width, lead, blocks, added = dict.fromkeys(Guess, 0.0), 0, 0.0, 1, 0.0
        if block:
            carrying = self._carrying = self._carrying or self._first_carrying(context)
            hits, blocks, added = carrying.hits, max(round(carrying.blocks), 1), carrying.seconds
            carried = {guess: np.array(self._expected(SOURCES[guess])) for guess in Guess}
            width = self._carried_width(carrying, carried, verify, context)
            lead = seconds(1, min(width + 2, block), context) - float(verify[1])
        estimates = Estimates(
            verify=verify,
            lead=lead,
            passes={
                source: self._drafting(offer, context) for source, offer in self._passes.items()
            },
            trees=self._trees.promised(),
            carried={guess: n[: width + 1] for guess, n in carried.items()},
            hits=hits,
            carrying=added,
        )
        near = 0.0 if self._tables is None else self._tables.steady.rate
        steady = prospect(estimates, blocks=blocks, width=width, near=near)
        worth = values(estimates, steady.rate)
        idle = max(worth.drafting, worth.lead) <= worth.plain + MARGIN - 1
        return Tables(verify.tolist(), steady, worth, width, context, idle)

    def _drafting(self, offer: DraftPass, context: int) -> Drafting:
        """What a kind of draft pass promises now, verified as chains."""
        accept = self._acceptance.of_source(offer.source, offer.most)
        widths = np.arange(1, offer.most + 1)
        if offer.view is View.DRAFTER:
            guess = self._costs.drafter or NETWORK_GUESS * self._costs.seconds(1, 0, context)
            longest = self._networks.get(offer.source, guess)
            seconds = [longest * _share(offer, int(width)) for width in widths]
        else:
            seconds = [self._costs.seconds(0, offer.rows(int(width)), context) for width in widths]
        return Drafting(np.array(sums(accept)[1:]), widths, np.array(seconds))

    def _expected(self, source: Source) -> list[float]:
        return sums(self._acceptance.of_source(source, self._block))

    def _carried_width(
        self, carrying: Carrying, carried: Mapping[Guess, Floats], verify: Floats, context: int
    ) -> int:
        """See `best_width`; at the rate that was found last."""
        rows, blocks = round(carrying.rows), max(carrying.blocks, 1.0)
        rate = self._tables.steady.rate if self._tables is not None else 1 / float(verify[1])

        def seconds(width: int) -> float:
            return self._costs.seconds(rows, round(blocks * (width + 1)), context)

        return best_width(carried, carrying.hits, verify, rate, seconds)


def _share(offer: DraftPass, width: int) -> float:
    """Of the time that the longest draft of a network takes, what a narrower one does."""
    return offer.rows(width) / offer.rows(offer.most)


def _worths(tokens: Sequence[float], rate: float, verify: Sequence[float]) -> list[float]:
    """What verifying 0, 1, ... draft tokens is worth, if so many of them will be accepted."""
    return [n - rate * verify[i + 1] for i, n in enumerate(tokens)]
