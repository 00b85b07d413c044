"""What a pass feeds its graph: tokens, positions, cache rows, mask. Plain numpy, no ggml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.runtime.ggml.passes import Piece
from orthrus_gguf.runtime.ggml.trees import TreeLayout
from orthrus_gguf.runtime.protocol import View

_HIDDEN = np.float16(-np.inf)


@dataclass(frozen=True)
class InputArrays:
    """Views of the input tensors of a graph (see `graph.Inputs` for shapes)."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    key_rows: NDArray[np.int64]
    value_rows: NDArray[np.int64]
    mask: NDArray[np.float16]
    wanted: NDArray[np.int32] | None
    stored: NDArray[np.int32] | None = None

    def fill(
        self,
        pieces: Sequence[Piece],
        length: int,
        element_offsets: NDArray[np.int64],
        tree: TreeLayout | None = None,
    ) -> None:
        """Describe a pass on a cache of `length` rows.

        An AR row goes where its position says; diffusion rows go after all AR rows, those of this
        pass included, where nothing but their own block sees them.
        element_offsets: of a row's value elements from its place in the cache: [0] where they lie
        in one piece, else one per element.
        tree: where the rows go if the only piece is a tree.
        """
        self.mask.fill(_HIDDEN)
        row, spare = 0, length
        for piece in pieces:
            rows = slice(row, row + piece.count)
            start = piece.segment.start + piece.first
            tokens = piece.segment.tokens
            self.tokens[rows] = tokens[piece.first : piece.first + piece.count]
            self.positions[rows] = np.arange(start, start + piece.count)
            if tree is not None:
                self._fill_tree(tree)
            elif piece.segment.view is View.AR:
                self.key_rows[rows] = self.positions[rows]
                spare = start + piece.count
                for i in range(piece.count):
                    self.mask[row + i, : start + i + 1] = 0
            else:
                self.key_rows[rows] = np.arange(spare, spare + piece.count)
                self.mask[rows, :start] = 0
                self.mask[rows, spare : spare + piece.count] = 0
                spare += piece.count
            row += piece.count
        np.add(
            self.key_rows[:, None],
            element_offsets,
            out=self.value_rows.reshape(-1, len(element_offsets)),
        )
        if self.wanted is not None:
            self.wanted[:] = wanted_rows(pieces)

    def _fill_tree(self, tree: TreeLayout) -> None:
        assert self.stored is not None
        self.positions[:] = [tree.start + depth for depth in tree.depths]
        # The graph has room for more stores; what is left repeats the last one.
        stores = np.array(tree.stores)
        self.stored[:], self.key_rows[:] = stores[-1]
        self.stored[: len(stores)], self.key_rows[: len(stores)] = stores.T
        for row, home in enumerate(tree.home):
            self.mask[row, : tree.edge] = 0
            self.mask[row, home : tree.column(row) + 1] = 0


def wanted_rows(pieces: Sequence[Piece]) -> list[int]:
    """The wanted rows of a pass, counted over all its pieces."""
    rows: list[int] = []
    first = 0
    for piece in pieces:
        rows += [first + i for i in piece.wanted]
        first += piece.count
    return rows
