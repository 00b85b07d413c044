"""Drafts: tokens that may come next, and where they come from.

Nothing here can change the text: the decode loop commits only what the AR view confirms.
"""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.drafting.tree import Branches, Tree
from orthrus_gguf.records import dataclass
from orthrus_gguf.sampling import Choice


@dataclass(frozen=True, eq=False)
class Source:
    """Where drafts come from: what their acceptance is counted under.

    name: in statistics and JSON. words: in legends. colour: in plots, as #rrggbb.
    likely: acceptance of each of their tokens as long as nothing is known of them.
    margin: how much more than the time of its rows a draft must promise. Above 1 for sources that
        take time on the host; those are not asked at all where rows are dear.
    """

    name: str
    words: str
    colour: str
    likely: float
    margin: float = 1.0


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for the positions after the anchor.

    confidence: per token, the drafter's probability of it. second: per token, the drafter's second
    choice and its probability; empty when the source has none.
    """

    source: Source
    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    second: tuple[tuple[int, float], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def after(self, count: int) -> Draft:
        """The draft without its first `count` tokens."""
        return Draft(self.source, self.tokens[count:], self.confidence[count:], self.second[count:])

    def second_shares(self, count: int) -> list[float]:
        """Of the first `count` tokens, the probability of the second choice if the first one is
        refused, as the drafter sees it."""
        if not self.second:
            return [0.0] * count
        pairs = zip(self.second[:count], self.confidence, strict=False)
        return [min(share / max(1 - sure, 1e-6), 1.0) for (_, share), sure in pairs]

    def tree(self, branches: Branches, count: int) -> Tree:
        """The tree of the first `count` branches (`tree.best_first`)."""
        tokens = tuple(
            self.second[depth][0] if second else self.tokens[depth]
            for depth, second in zip(branches.depths[:count], branches.seconds, strict=False)
        )
        return Tree(tokens, branches.parents).first(count)


#: What plain decoding verifies.
NONE = Source("none", "nothing", "#888888", 0.0)
NO_DRAFT = Draft(NONE, (), ())


def read_draft(source: Source, choices: Sequence[Choice | None]) -> Draft:
    """The draft that consecutive rows propose. It ends at the first that says nothing: a broken
    drafter may cost time, never text."""
    known: list[Choice] = []
    for choice in choices:
        if choice is None:
            break
        known.append(choice)
    return Draft(
        source,
        tuple([choice.token for choice in known]),
        tuple([choice.probability for choice in known]),
        tuple([(choice.second, choice.second_probability) for choice in known]),
    )
