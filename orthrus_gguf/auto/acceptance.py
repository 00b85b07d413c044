"""How often drafts are accepted, learned while decoding and forgotten as the text moves on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import field

from orthrus_gguf.drafting.block import BLOCK
from orthrus_gguf.drafting.carried_blocks import LAST, NEXT
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.plan import prior_acceptance
from orthrus_gguf.records import dataclass

#: Confidences are told apart in this many classes.
CLASSES = 10

#: Observations that the prior is worth: per class of confidence, and per position of a draft.
PRIOR_WEIGHT = 4.0

#: What an observation counts for after one more cycle with drafts of its source (half: 34 cycles).
MEMORY = 0.98

#: Sources that are blocks, in a pass of their own or not.
BLOCKS = (BLOCK, NEXT, LAST)

#: How often a second choice is right where the first was refused, beside what the drafter promises,
#: before anything is known.
PROMISE_IS_KEPT = 1.0

#: How often what a draft says behind its own second choice is right, beside what it says behind its
#: first choice, before anything is known. (0.65 to 0.75 on the demo model.)
BEHIND_SECOND = 0.7


@dataclass
class _Counts:
    """Accepted and offered tokens of one source, in classes. weight: of the prior."""

    prior: list[float]
    weight: float = PRIOR_WEIGHT
    accepted: list[float] = field(init=False)
    offered: list[float] = field(init=False)
    _shares: list[float] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.accepted = [0.0] * len(self.prior)
        self.offered = [0.0] * len(self.prior)

    def share(self, i: int) -> float:
        known = self.weight * self.prior[i]
        return (self.accepted[i] + known) / (self.offered[i] + self.weight)

    def shares(self) -> list[float]:
        """Of all classes. (Asked for several times between two changes.)"""
        if self._shares is None:
            weight = self.weight
            self._shares = [
                (accepted + weight * known) / (offered + weight)
                for accepted, offered, known in zip(
                    self.accepted, self.offered, self.prior, strict=True
                )
            ]
        return self._shares

    def add(self, i: int, accepted: float, offered: float = 1.0) -> None:
        self.offered[i] += offered
        self.accepted[i] += accepted
        self._shares = None

    def forgive(self, memory: float) -> None:
        """Forget a little of those that did worse than was thought at first."""
        for i, (accepted, offered) in enumerate(zip(self.accepted, self.offered, strict=True)):
            if accepted < self.prior[i] * offered:
                self.accepted[i], self.offered[i] = memory * accepted, memory * offered
        self._shares = None

    def forget(self, memory: float) -> None:
        self.accepted = [value * memory for value in self.accepted]
        self.offered = [value * memory for value in self.offered]
        self._shares = None


def _counts_of(
    table: dict[Source, _Counts], source: Source, prior: Sequence[float], weight: float
) -> _Counts:
    """The counts of a source, new ones if there are none."""
    found = table.get(source)
    if found is None:
        found = table[source] = _Counts(list(prior), weight)
    return found


class Acceptance:
    """Probabilities that draft tokens are accepted, given that those before them are.

    For a draft at hand, the drafter's confidence decides; what a class of confidence is worth is
    learned per source. For a draft that does not exist yet, its position decides.
    """

    def __init__(self, longest: int) -> None:
        """longest: positions to count; later ones count as the last."""
        self._longest = longest
        self._of_class = [prior_acceptance((i + 0.5) / CLASSES) for i in range(CLASSES)]
        self._by_confidence: dict[Source, _Counts] = {}
        self._by_position: dict[Source, _Counts] = {}
        self._seconds: dict[Source, _Counts] = {}
        self._behind: dict[Source, _Counts] = {}

    def _confidences(self, source: Source) -> _Counts:
        return _counts_of(self._by_confidence, source, self._of_class, PRIOR_WEIGHT)

    def _positions(self, source: Source) -> _Counts:
        prior = [source.likely] * self._longest
        return _counts_of(self._by_position, source, prior, PRIOR_WEIGHT)

    def of_draft(self, draft: Draft, most: int) -> list[float]:
        """Per token of a draft at hand, for at most `most` tokens."""
        shares = self._confidences(draft.source).shares()
        return [shares[_class(value)] for value in draft.confidence[:most]]

    def of_source(self, source: Source, count: int) -> list[float]:
        """Per position of a draft that this source might give.

        What little is known of one kind of block is filled up with what is known of all.
        """
        counts = self._positions(source)
        if source in BLOCKS:
            likeness = source.likely / BLOCK.likely
            prior = [likeness * value for value in self._of_blocks(count)]
        else:
            prior = counts.prior[:count]
        shares = [
            (accepted + PRIOR_WEIGHT * known) / (offered + PRIOR_WEIGHT)
            for accepted, offered, known in zip(
                counts.accepted, counts.offered, prior, strict=False
            )
        ]
        return shares + shares[-1:] * (count - len(shares))

    def _of_blocks(self, count: int) -> list[float]:
        """Per position of a block of any kind."""
        kinds = [self._positions(source) for source in BLOCKS]
        accepted = map(sum, zip(*(kind.accepted for kind in kinds), strict=True))
        offered = map(sum, zip(*(kind.offered for kind in kinds), strict=True))
        unknown = PRIOR_WEIGHT * BLOCK.likely
        return [
            (yes + unknown) / (all_ + PRIOR_WEIGHT)
            for yes, all_, _ in zip(accepted, offered, range(count), strict=False)
        ]

    def observe(self, cycle: Cycle) -> None:
        """Count the verified drafts of a cycle, up to the first that was refused."""
        if not cycle.drafts:
            return
        by_confidence = self._confidences(cycle.draft.source)
        by_confidence.forget(MEMORY)
        agreed = cycle.agreed
        # A first choice that a tree left out may have been right; what follows it is then not told.
        refused = agreed < min(len(cycle.drafts), len(cycle.tokens))
        told = [1.0] * agreed + [0.0] * refused
        for value, verdict in zip(cycle.draft.confidence, told, strict=False):
            by_confidence.add(_class(value), verdict)
        if len(cycle.passes) > 1:  # a draft pass: whatever came of it was verified
            self._expect(cycle.draft.source, told, len(told))
        if refused and agreed < len(cycle.draft.second):
            right = cycle.draft.second[agreed][0] == cycle.tokens[agreed]
            counts = self._second_choices(cycle.draft.source)
            counts.forget(MEMORY)
            counts.add(0, right, cycle.draft.second_shares(agreed + 1)[agreed])
            if right:
                self._observe_behind(cycle.draft, cycle.tokens, agreed + 1)

    def _observe_behind(self, draft: Draft, tokens: Sequence[int], at: int) -> None:
        """Count the token of a draft that stands behind an accepted second choice, at `at`."""
        if at < min(len(draft), len(tokens)):
            behind = _counts_of(self._behind, draft.source, [BEHIND_SECOND], PRIOR_WEIGHT)
            behind.forget(MEMORY)
            expected = self.of_draft(draft, at + 1)[at]
            behind.add(0, draft.tokens[at] == tokens[at], expected)

    def behind(self, source: Source) -> float:
        """How often tokens behind a second choice are right, beside those behind a first one."""
        counts = self._behind.get(source)
        return BEHIND_SECOND if counts is None else min(counts.share(0), 1.0)

    def _second_choices(self, source: Source) -> _Counts:
        """Second choices that were right where the first was refused, of as many as promised."""
        return _counts_of(self._seconds, source, [PROMISE_IS_KEPT], 1.0)

    def seconds_of_draft(self, draft: Draft, most: int) -> list[float]:
        """Per token of a draft at hand, the probability that its second choice is right if the
        first one is refused; for at most `most` tokens."""
        kept = self._second_choices(draft.source).share(0)
        return [min(kept * share, 1.0) for share in draft.second_shares(min(most, len(draft)))]

    def foresee(self, draft: Draft) -> None:
        """Count what a draft at hand promises, whether it will be verified or not.

        Only good ones are verified, so their outcome would say too much of the next ones.
        """
        if len(draft):
            self._expect(draft.source, self.of_draft(draft, len(draft)), len(draft))

    def _expect(self, source: Source, accept: Sequence[float], most: int) -> None:
        """Count acceptance by position; each position by how likely it is to be reached."""
        by_position = self._positions(source)
        by_position.forget(MEMORY)
        accepted, offered = by_position.accepted, by_position.offered
        last, reached = len(offered) - 1, 1.0
        for i, value in enumerate(accept[:most]):
            i = i if i < last else last
            offered[i] += reached
            reached *= value
            accepted[i] += reached

    def relax(self, memory: float, but: Collection[Source] = ()) -> None:
        """Forget a little of what failed, of all sources but some: it is tried again one day."""
        for table in (self._by_confidence, self._by_position, self._seconds, self._behind):
            for source, counts in table.items():
                if source not in but:
                    counts.forgive(memory)


def _class(confidence: float) -> int:
    return int(confidence * CLASSES) if confidence < 1 else CLASSES - 1


def sums(accept: Sequence[float]) -> list[float]:
    """Expected accepted tokens of the first 0, 1, ... tokens of a draft: one entry more."""
    total, product = 0.0, 1.0
    totals = [0.0]
    for value in accept:
        product *= value
        total += product
        totals.append(total)
    return totals
