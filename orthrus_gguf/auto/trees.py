"""What trees of drafts promise: best first, and in the mean of their source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from orthrus_gguf.auto.acceptance import Acceptance, sums
from orthrus_gguf.auto.rate import Floats
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.tree import Branches, best_first

#: Draft tokens of a tree at most, and the probability that each must have at least.
MOST_NODES, LEAST_NODE = 64, 0.01

#: Weight of the newest draft in what the trees of its source promise.
NEWEST = 0.1


class Trees:
    """Running means of what drafts promised that were about to be verified, by source."""

    def __init__(self, acceptance: Acceptance, longest: int) -> None:
        """longest: positions of a draft that are counted."""
        self._acceptance, self._longest = acceptance, longest
        # Tokens of the whole draft as a chain, and then of its trees of 1, 2, ... nodes.
        self._means: dict[Source, Floats] = {}

    def branches(self, draft: Draft, accept: Sequence[float]) -> Branches:
        """What trees of a draft are made of. What they promise joins the mean of its source.

        accept: see `best_first`.
        """
        found = best_first(
            accept,
            self._acceptance.seconds_of_draft(draft, len(accept)),
            MOST_NODES,
            LEAST_NODE,
            self._acceptance.behind(draft.source),
        )
        promised = np.zeros(1 + MOST_NODES)
        promised[0] = sums(accept)[-1]
        promised[1 : 1 + len(found.probabilities)] = found.probabilities
        promised[1:] = promised[1:].cumsum()
        mean = self._means.setdefault(draft.source, promised)
        mean += NEWEST * (promised - mean)
        return found

    def promised(self) -> Mapping[Source, Floats]:
        """By source, tokens that will be accepted of trees of 1, 2, ... tokens.

        The means are of drafts that were worth verifying. Where chains of a source promise less by
        now, so do its trees: or nobody would notice that it has failed.
        """
        found = {}
        for source, mean in self._means.items():
            chain = sums(self._acceptance.of_source(source, self._longest))[-1]
            found[source] = mean[1:] * min(chain / mean[0], 1.0)
        return found
