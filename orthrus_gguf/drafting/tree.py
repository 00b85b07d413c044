"""Trees: what is verified in one pass. A chain is a tree without branches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from orthrus_gguf.records import dataclass


@dataclass(frozen=True)
class Tree:
    """Draft tokens to verify in one pass.

    tokens: of the rows behind the anchor's, which is row 0. parents: the row that each of these
    rows follows; None for a chain, where that is the row before.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...] | None = None

    def first(self, count: int) -> Tree:
        """The tree of its first `count` tokens."""
        parents = None if self.parents is None else self.parents[:count]
        if parents is not None and parents == tuple(range(len(parents))):
            parents = None
        return Tree(self.tokens[:count], parents)

    def children(self, row: int) -> Sequence[int]:
        """The rows that follow a row, likeliest first."""
        if self.parents is None:
            return range(row + 1, min(row + 2, len(self.tokens) + 1))
        return [child for child, parent in enumerate(self.parents, 1) if parent == row]

    def child(self, row: int, token: int) -> int | None:
        """The row of `token` among those that follow a row."""
        tokens = self.tokens
        if self.parents is None:
            return row + 1 if row < len(tokens) and tokens[row] == token else None
        for i in range(row, len(tokens)):  # children come later
            if self.parents[i] == row and tokens[i] == token:
                return i + 1
        return None

    def path(self, tokens: Sequence[int]) -> list[int]:
        """The rows that spell `tokens`, as far as there are such, behind row 0."""
        path = [0]
        for token in tokens:
            row = self.child(path[-1], token)
            if row is None:
                break
            path.append(row)
        return path

    def likeliest(self, path: Sequence[int]) -> tuple[int, ...]:
        """Tokens of a path from row 0 on, and then of its likeliest continuation."""
        if self.parents is None:
            return self.tokens
        rows = list(path)
        for row in range(rows[-1] + 1, len(self.parents) + 1):  # the likeliest child comes first
            if self.parents[row - 1] == rows[-1]:
                rows.append(row)
        return tuple([self.tokens[row - 1] for row in rows[1:]])


#: What plain decoding verifies.
NO_TREE = Tree(())


@dataclass(frozen=True)
class Branches:
    """The likeliest continuations of a draft, in the order in which a tree should take them.

    Of each: depth (0 for the tokens right behind the anchor), whether it is the second choice
    there, the row it follows, and the probability that it is accepted.
    """

    depths: tuple[int, ...]
    seconds: tuple[bool, ...]
    parents: tuple[int, ...]
    probabilities: tuple[float, ...]


def best_first(
    accept: Sequence[float],
    second: Sequence[float],
    nodes: int,
    least: float = 0.0,
    behind: float = 1.0,
) -> Branches:
    """The `nodes` likeliest continuations that two choices per token allow.

    accept: per token, the probability that the first choice is accepted if the tokens before it
    are. second: that the second choice is, if the first is refused. What follows a second choice is
    what the same draft says behind it; first choices there are accepted `behind` times as often.
    least: what is less likely is left out. The first n are the best tree of n nodes, since no token
    is likelier than the one that it follows.
    """
    found: list[tuple[int, bool, int, float]] = []
    # Of equals, what was found first goes first. The last entry: what `accept` is multiplied by.
    waiting: list[tuple[float, int, bool, int, float]] = []

    def add_children(row: int, depth: int, probability: float, factor: float) -> None:
        if depth == len(accept):
            return
        sure = accept[depth] * factor
        first = probability * sure
        if first > least:
            heapq.heappush(waiting, (-first, row, False, depth, factor))
        other = probability * (1 - sure) * second[depth]
        if other > least:
            heapq.heappush(waiting, (-other, row, True, depth, behind))

    add_children(0, 0, 1.0, 1.0)
    while waiting and len(found) < nodes:
        probability, parent, is_second, depth, factor = heapq.heappop(waiting)
        found.append((depth, is_second, parent, -probability))
        add_children(len(found), depth + 1, -probability, factor)
    columns = tuple(zip(*found, strict=True)) or ((), (), (), ())
    return Branches(*columns)
