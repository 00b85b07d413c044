"""Where the rows of a tree lie in the cache, so that each gives the bits that it gives in a chain.

Sums over keys depend on the place of each key within groups of COLUMNS. So a branch cannot lie
just anywhere: it gets a *region* of whole groups beyond the rows in use, which looks like the cache
would from the last group's edge on if the branch were the text. Copies of the cached rows behind
that edge come first, then the keys of all rows on the way to the branch's leaf. A row of the branch
sees the cache up to that edge, and its region. Plain bookkeeping, no ggml.
"""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.cache_layout import COLUMNS
from orthrus_gguf.runtime.protocol import depths, path_to

#: Stores of a graph come in multiples of this, so that trees of different forms can share one.
STORES = 32


@dataclass(frozen=True)
class TreeLayout:
    """A tree on a cache of `start` rows.

    edge: where the last group of columns before `start` begins. regions: where the branches' lie;
    home: per row, the first that holds it, or `edge` for the trunk, which lies where a chain would.
    stores: (row, column) for all keys that the pass writes. columns: that attention must reach.
    """

    parents: tuple[int, ...]
    start: int
    edge: int
    depths: tuple[int, ...]
    regions: tuple[int, ...]
    home: tuple[int, ...]
    stores: tuple[tuple[int, int], ...]
    columns: int

    def column(self, row: int) -> int:
        """Where the keys of a row can be found."""
        return self.home[row] + self.start - self.edge + self.depths[row]


def tree_layout(parents: Sequence[int], start: int) -> TreeLayout:
    """The layout of a tree behind `start` rows. The path of first children is the trunk."""
    depth = depths(parents)
    edge = start // COLUMNS * COLUMNS
    first_children = {parent: row for row, parent in reversed(list(enumerate(parents)))}
    leaf = 0
    while leaf in first_children:
        leaf = first_children[leaf]
    home = dict.fromkeys(path_to(leaf, parents), edge)
    stores = [(row, start + depth[row]) for row in home]
    regions: list[int] = []
    end = _groups(start + max(depth) + 1)
    for row in range(len(parents)):
        if row in first_children or row == leaf:
            continue
        path = path_to(row, parents)
        for ancestor in path:
            home.setdefault(ancestor, end)
            stores.append((ancestor, end + start - edge + depth[ancestor]))
        regions.append(end)
        end += _groups(start - edge + len(path))
    return TreeLayout(
        tuple(parents),
        start,
        edge,
        tuple(depth),
        tuple(regions),
        tuple(home[row] for row in range(len(parents))),
        tuple(stores),
        end,
    )


def fitting_rows(parents: Sequence[int], start: int, columns: int) -> int:
    """How many rows of a tree, from the first on, have a layout behind `start` rows that needs no
    more than so many columns; at least 1.

    A row either follows a leaf, whose region grows, or begins a branch, which takes a new one.
    """
    behind, deepest, regions = start % COLUMNS, 0, 0
    depth, is_leaf, in_trunk = [0], [True], [True]
    for row, parent in enumerate(parents[1:], 1):
        length = behind + depth[parent] + 2  # of the region that ends with this row
        trunk = is_leaf[parent] and in_trunk[parent]
        if not trunk:
            regions += _groups(length) - (_groups(length - 1) if is_leaf[parent] else 0)
        is_leaf[parent] = False
        depth.append(depth[parent] + 1)
        is_leaf.append(True)
        in_trunk.append(trunk)
        deepest = max(deepest, depth[row])
        if _groups(start + deepest + 1) + regions > columns:
            return row
    return len(parents)


def _groups(columns: int) -> int:
    """Whole groups of columns."""
    return -(-columns // COLUMNS) * COLUMNS


def padded_stores(count: int) -> int:
    """Stores of the graph that makes `count` of them."""
    return -(-count // STORES) * STORES
