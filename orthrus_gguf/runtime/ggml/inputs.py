"""What a pass feeds its graph: tokens, positions, cache rows, mask. Plain numpy, no ggml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.runtime.passes import Piece, wanted_rows
from orthrus_gguf.runtime.protocol import View, depths
from orthrus_gguf.runtime.trees import TreeLayout

_HIDDEN = np.float16(-np.inf)


class ShareRows(NamedTuple):
    """What one sequence has in a pass.

    pieces: its AR rows first. end: where rows of blocks go in its cache: behind all AR rows, those
    of this pass included. tree: where the AR rows go if they are a tree.
    """

    pieces: Sequence[Piece]
    end: int
    tree: TreeLayout | None = None


@dataclass(frozen=True)
class ShareArrays:
    """Views of the input tensors about one sequence's rows, shaped as `input_tensors.ShareInputs`.

    value_rows: [rows, elements]. element_offsets: of a row's value elements from its place in the
    cache: [0] where they lie in one piece, else one per element.
    """

    key_rows: NDArray[np.int64]
    value_rows: NDArray[np.int64]
    mask: NDArray[np.float16]
    stored: NDArray[np.int32] | None
    element_offsets: NDArray[np.int64]

    def fill(self, rows: ShareRows) -> None:
        """An AR row goes where its position says; diffusion rows go after all AR rows, where
        nothing but their own block sees them."""
        self.mask.fill(_HIDDEN)
        row = 0
        for piece in rows.pieces:
            stop, start = row + piece.count, piece.start
            if rows.tree is not None:
                self._fill_tree(rows.tree)
            elif piece.segment.view is View.AR:
                self.key_rows[row:stop] = np.arange(start, start + piece.count)
                for i in range(piece.count):
                    self.mask[row + i, : start + i + 1] = 0
            else:
                place = rows.end + piece.offset
                self.key_rows[row:stop] = np.arange(place, place + piece.count)
                self.mask[row:stop, :start] = 0
                self.mask[row:stop, place : place + piece.count] = 0
            row = stop
        np.add(self.key_rows[:, None], self.element_offsets, out=self.value_rows)

    def _fill_tree(self, tree: TreeLayout) -> None:
        assert self.stored is not None
        # The graph has room for more stores; what is left repeats the last one.
        stores = np.array(tree.stores)
        self.stored[:], self.key_rows[:] = stores[-1]
        self.stored[: len(stores)], self.key_rows[: len(stores)] = stores.T
        for row, home in enumerate(tree.home):
            self.mask[row, : tree.edge] = 0
            self.mask[row, home : tree.column(row) + 1] = 0


@dataclass(frozen=True)
class InputArrays:
    """Views of the input tensors of a graph (see `input_tensors.Inputs` for shapes)."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    wanted: NDArray[np.int32] | None
    shares: tuple[ShareArrays, ...]

    def fill(self, pieces: Sequence[Piece], shares: Sequence[ShareRows]) -> None:
        """Describe a pass. pieces: in the order of its rows; shares: the same by sequence."""
        row = 0
        for piece in pieces:
            stop, parents = row + piece.count, piece.segment.parents
            self.tokens[row:stop] = piece.tokens
            positions = np.arange(piece.start, piece.start + piece.count)
            if parents is not None:
                positions = piece.start + np.array(depths(parents))
            self.positions[row:stop] = positions
            row = stop
        for arrays, rows in zip(self.shares, shares, strict=True):
            arrays.fill(rows)
        if self.wanted is not None:
            self.wanted[:] = wanted_rows(pieces)
