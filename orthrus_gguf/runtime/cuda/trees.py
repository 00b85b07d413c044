"""Where the rows of a tree lie in the cache, and which of them attention takes together.

A branch is a run of rows that see the same columns (`orthrus_kernels.attention`): the cache up to
an *edge*, where the branch leaves the trunk, and a region of its own from there on. The order of
sums over keys follows from the column alone, not from where the key lies, so each row gives the
bits that it gives in a chain. Rows that several branches share are written into each region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orthrus_kernels.attention.attention import NO_EDGE

from orthrus_gguf.runtime.protocol import depths, path_to


@dataclass(frozen=True)
class Branch:
    """Rows of a tree whose keys from column `edge` on lie `shift` further."""

    rows: tuple[int, ...]
    edge: int
    shift: int


@dataclass(frozen=True)
class TreeLayout:
    """A tree behind `start` rows.

    branches: the path of first children first. places: per row, where its keys can be found;
    more: per row, where else they are written. columns: that the cache must have.
    """

    parents: tuple[int, ...]
    start: int
    depths: tuple[int, ...]
    branches: tuple[Branch, ...]
    places: tuple[int, ...]
    more: tuple[tuple[int, ...], ...]
    columns: int

    @property
    def order(self) -> tuple[int, ...]:
        """The rows, branch by branch."""
        return tuple(row for branch in self.branches for row in branch.rows)

    def moves(self, path: Sequence[int]) -> list[tuple[int, int]]:
        """(from, to) of the keys of a path that do not lie where the text has them."""
        pairs = ((self.places[row], self.start + i) for i, row in enumerate(path))
        return [(source, target) for source, target in pairs if source != target]


def tree_layout(parents: Sequence[int], start: int) -> TreeLayout:
    """The layout of a tree. Regions begin behind the deepest row, so that no move of a path writes
    where another one reads."""
    depth = depths(parents)
    first_children = {parent: row for row, parent in reversed(list(enumerate(parents)))}
    leaf = 0
    while leaf in first_children:
        leaf = first_children[leaf]
    trunk = path_to(leaf, parents)
    places = {row: start + depth[row] for row in trunk}
    more: dict[int, list[int]] = {}
    branches = [Branch(tuple(trunk), NO_EDGE, 0)]
    end = start + max(depth) + 1
    for row in range(len(parents)):
        if row in first_children or row == leaf:
            continue
        path = [ancestor for ancestor in path_to(row, parents) if ancestor not in trunk]
        edge = start + depth[path[0]]
        own = []
        for place, ancestor in enumerate(path, end):
            if ancestor in places:
                more.setdefault(ancestor, []).append(place)
            else:
                places[ancestor] = place
                own.append(ancestor)
        branches.append(Branch(tuple(own), edge, end - edge))
        end += len(path)
    rows = range(len(parents))
    return TreeLayout(
        tuple(parents),
        start,
        tuple(depth),
        tuple(branches),
        tuple(places[row] for row in rows),
        tuple(tuple(more.get(row, ())) for row in rows),
        end,
    )
