"""What a call asks of each sequence, and what a sequence has in each of its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.cache_layout import columns_for
from orthrus_gguf.runtime.ggml.inputs import ShareRows
from orthrus_gguf.runtime.ggml.shape import Share
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import Segment, View
from orthrus_gguf.runtime.trees import TreeLayout, padded_stores, tree_layout


@dataclass
class OneSequence:
    """One sequence in a call.

    end: where rows of its blocks go in its cache: behind all AR rows of the call. reach: cache rows
    that its attention may see at most. ar: its AR segment; tree: how that lies if it is a tree.
    """

    cache: GgmlCache
    end: int
    reach: int
    ar: Segment | None = None
    tree: TreeLayout | None = None

    def prepare(self) -> None:
        """Find the places of a tree's rows. Raises ValueError if the cache has too few."""
        if self.ar is not None and self.ar.parents is not None:
            self.tree = tree_layout(self.ar.parents, self.ar.start)
            self.cache.make_room(self.tree)

    def finish(self) -> None:
        """Have the AR rows, which have run, wait for `commit`."""
        if self.ar is not None:
            self.cache.hold(len(self.ar), self.tree)

    def rows(self, pieces: Sequence[Piece]) -> ShareRows:
        """Its rows in one pass."""
        return ShareRows(pieces, self.end, self.tree)

    def share(self, pieces: Sequence[Piece]) -> Share:
        """The same for the graph, with as many columns as its rows and blocks reach."""
        ar = diffusion = stores = reach = 0
        for piece in pieces:
            if piece.segment.view is View.AR:
                ar, reach = piece.count, piece.start + piece.count
            else:
                diffusion += piece.count
                reach = max(reach, self.end + piece.offset + piece.count)
        if self.tree is not None:
            reach, stores = self.tree.columns, padded_stores(len(self.tree.stores))
        columns = min(columns_for(reach), self.cache.rows)
        return Share(self.cache.serial, ar, diffusion, columns, stores)


def sequences_of(segments: Sequence[Segment]) -> dict[int, OneSequence]:
    """The sequences of a call by their cache's id, in order; what was pending is dropped.

    Raises ValueError for a cache that is not one of this runtime, or closed.
    """
    found: dict[int, OneSequence] = {}
    for segment in segments:
        cache, rows = segment.cache, len(segment)
        own = found.get(id(cache))
        if own is None:
            if not isinstance(cache, GgmlCache) or cache.closed:
                raise ValueError("the cache is closed, or belongs to another runtime")
            cache.drop()
            own = found[id(cache)] = OneSequence(cache, cache.length, cache.length)
        own.reach += rows
        if segment.view is View.AR:
            own.ar = segment
            own.end += rows
    return found


def by_sequence(
    pieces: Sequence[Piece], sequences: dict[int, OneSequence]
) -> list[tuple[OneSequence, Sequence[Piece]]]:
    """The pieces of a pass, sequence by sequence in the order of the call."""
    if len(sequences) == 1:
        return [(own, pieces) for own in sequences.values()]
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(id(piece.segment.cache), []).append(piece)
    return [(own, found[key]) for key, own in sequences.items() if key in found]
