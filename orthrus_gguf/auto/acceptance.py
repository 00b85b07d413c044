"""How often drafts are accepted, learned while decoding and forgotten as the text moves on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.policy import Cycle, prior_acceptance

#: Confidences are told apart in this many classes.
CLASSES = 10

#: Observations that the prior is worth: per class of confidence, and per position of a draft.
PRIOR_WEIGHT = 4.0

#: What an observation counts for after one more cycle with drafts of its source (half: 34 cycles).
MEMORY = 0.98

#: Acceptance of each token of a draft that nothing is known about.
UNKNOWN = {
    Source.BLOCK: 0.7,
    Source.NEXT: 0.7,
    Source.LAST: 0.6,
    Source.TAIL: 0.4,
    Source.LOOKUP: 0.7,
}

#: Sources that are blocks, in a pass of their own or not.
BLOCKS = (Source.BLOCK, Source.NEXT, Source.LAST)


@dataclass
class _Counts:
    """Accepted and offered tokens of one source, in classes."""

    prior: list[float]
    accepted: list[float] = field(init=False)
    offered: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = [0.0] * len(self.prior)
        self.offered = [0.0] * len(self.prior)

    def share(self, i: int) -> float:
        return (self.accepted[i] + PRIOR_WEIGHT * self.prior[i]) / (self.offered[i] + PRIOR_WEIGHT)

    def add(self, i: int, accepted: float, offered: float = 1.0) -> None:
        self.offered[i] += offered
        self.accepted[i] += accepted

    def forget(self, memory: float) -> None:
        self.accepted = [value * memory for value in self.accepted]
        self.offered = [value * memory for value in self.offered]


class Acceptance:
    """Probabilities that draft tokens are accepted, given that those before them are.

    For a draft at hand, the drafter's confidence decides; what a class of confidence is worth is
    learned per source. For a draft that does not exist yet, its position decides.
    """

    def __init__(self, longest: int) -> None:
        """longest: positions to count; later ones count as the last."""
        of_class = [prior_acceptance((i + 0.5) / CLASSES) for i in range(CLASSES)]
        self._by_confidence = {source: _Counts(of_class) for source in Source}
        self._by_position = {source: _Counts([UNKNOWN[source]] * longest) for source in Source}

    def of_draft(self, draft: Draft, most: int) -> list[float]:
        """Per token of a draft at hand, for at most `most` tokens."""
        counts = self._by_confidence[draft.source]
        shares = [counts.share(i) for i in range(CLASSES)]
        return [shares[_class(value)] for value in draft.confidence[:most]]

    def of_source(self, source: Source, count: int) -> list[float]:
        """Per position of a draft that this source might give.

        What little is known of one kind of block is filled up with what is known of all.
        """
        counts = self._by_position[source]
        if source in BLOCKS:
            likeness = UNKNOWN[source] / UNKNOWN[Source.BLOCK]
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
        kinds = [self._by_position[source] for source in BLOCKS]
        accepted = map(sum, zip(*(kind.accepted for kind in kinds), strict=True))
        offered = map(sum, zip(*(kind.offered for kind in kinds), strict=True))
        unknown = PRIOR_WEIGHT * UNKNOWN[Source.BLOCK]
        return [
            (yes + unknown) / (all_ + PRIOR_WEIGHT)
            for yes, all_, _ in zip(accepted, offered, range(count), strict=False)
        ]

    def observe(self, cycle: Cycle) -> None:
        """Count the verified drafts of a cycle, up to the first that was refused."""
        if not cycle.drafts:
            return
        by_confidence = self._by_confidence[cycle.draft.source]
        by_confidence.forget(MEMORY)
        reached = min(cycle.accepted + 1, len(cycle.drafts))
        for i, value in enumerate(cycle.draft.confidence[:reached]):
            by_confidence.add(_class(value), i < cycle.accepted)
        if cycle.draft.source is Source.BLOCK:
            self._expect(cycle.draft.source, [1.0] * cycle.accepted + [0.0], len(cycle.drafts))

    def foresee(self, draft: Draft) -> None:
        """Count what a draft at hand promises, whether it will be verified or not.

        Only good ones are verified, so their outcome would say too much of the next ones.
        """
        if len(draft):
            self._expect(draft.source, self.of_draft(draft, len(draft)), len(draft))

    def _expect(self, source: Source, accept: Sequence[float], most: int) -> None:
        """Count acceptance by position; each position by how likely it is to be reached."""
        by_position = self._by_position[source]
        by_position.forget(MEMORY)
        last, reached = len(by_position.prior) - 1, 1.0
        for i, value in enumerate(accept[:most]):
            by_position.add(min(i, last), reached * value, reached)
            reached *= value

    def relax(self, memory: float) -> None:
        """Forget a little of everything, so that what failed is tried again one day."""
        for counts in (*self._by_confidence.values(), *self._by_position.values()):
            counts.forget(memory)


def _class(confidence: float) -> int:
    return min(int(confidence * CLASSES), CLASSES - 1)


def sums(accept: Sequence[float]) -> list[float]:
    """Expected accepted tokens of the first 0, 1, ... tokens of a draft: one entry more."""
    total, product = 0.0, 1.0
    totals = [0.0]
    for value in accept:
        product *= value
        total += product
        totals.append(total)
    return totals
