"""The rows of a pass as the kernels see them: where their keys go, what they see, how they turn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.trees import TreeLayout

Ints = NDArray[np.int64]

#: Positions whose cosines and sines are computed at once.
ANGLES = 1024


@dataclass(frozen=True)
class Place:
    """Of the rows of one piece.

    positions. keys: cache columns that their keys and values go to; copies: others, by row. They
    see columns 0 .. sees-1, and first .. stop-1. groups: (first row, rows) that see the same
    columns, but for what is not their own past.
    """

    positions: Ints
    keys: Ints
    sees: Ints
    first: Ints
    stop: Ints
    groups: tuple[tuple[int, int], ...]
    copies: dict[int, list[int]]

    def fill(self, rows: NDArray[np.void], keep: list[NDArray[np.int32]]) -> None:
        """Write it into `library.ROW` records. What they point to is put into `keep`."""
        rows["key"], rows["sees"] = self.keys, self.sees
        rows["from"], rows["to"] = self.first, self.stop
        rows["copies"] = 0
        for row, columns in self.copies.items():
            keep.append(np.array(columns, np.int32))
            rows["copies"][row], rows["more_keys"][row] = len(columns), keep[-1].ctypes.data


def place_chain(start: int, count: int) -> Place:
    """AR rows lie at their positions, and see what lies before them, and themselves."""
    at = np.arange(start, start + count)
    nothing = np.zeros(count, np.int64)
    return Place(at, at, at + 1, nothing, nothing, ((0, count),), {})


def place_block(start: int, count: int, column: int) -> Place:
    """A block at position `start` lies at a column of its own, a multiple of 16, and sees itself
    and what lies before it."""
    at = np.arange(count)
    every = np.ones(count, np.int64)
    place = (start + at, column + at, start * every, column * every, (column + count) * every)
    return Place(*place, ((0, count),), {})


def place_tree(tree: TreeLayout) -> Place:
    """Rows of the trunk lie as a chain does; those of a branch see the cache up to the edge, and
    their region."""
    keys = np.array([tree.column(row) for row in range(len(tree.home))])
    home = np.array(tree.home)
    trunk = home == tree.edge
    copies: dict[int, list[int]] = {}
    for row, column in tree.stores:
        if column != keys[row]:
            copies.setdefault(row, []).append(column)
    edges = [0, *(np.flatnonzero(np.diff(home)) + 1).tolist(), len(home)]
    return Place(
        tree.start + np.array(tree.depths),
        keys,
        np.where(trunk, keys + 1, tree.edge),
        np.where(trunk, 0, home),
        np.where(trunk, 0, keys + 1),
        tuple((first, stop - first) for first, stop in pairwise(edges)),
        copies,
    )


class Angles:
    """Cosines and sines of positions, computed as positions come up."""

    def __init__(self, frequencies: NDArray[np.float64], magnitude: float) -> None:
        """frequencies: [head_dim / 2], in radians per position."""
        self._frequencies, self._magnitude = frequencies, magnitude
        self._tables: dict[int, NDArray[np.float32]] = {}

    def point(self, rows: NDArray[np.void], positions: Ints) -> None:
        """Point `library.ROW` records at those of their positions."""
        line = 4 * len(self._frequencies)
        number, at = np.divmod(positions, ANGLES)
        base = np.array([self._table(int(one)).ctypes.data for one in number], np.uintp)
        rows["cos"] = base + (at * line).astype(np.uintp)
        rows["sin"] = rows["cos"] + np.uintp(ANGLES * line)

    def _table(self, number: int) -> NDArray[np.float32]:
        """Cosines and sines [2, ANGLES, head_dim / 2] of a run of positions."""
        table = self._tables.get(number)
        if table is None:
            positions = np.arange(number * ANGLES, (number + 1) * ANGLES, dtype=np.float64)
            angles = positions[:, None] * self._frequencies
            both = np.stack([np.cos(angles), np.sin(angles)]) * self._magnitude
            table = self._tables[number] = both.astype(np.float32)
        return table
