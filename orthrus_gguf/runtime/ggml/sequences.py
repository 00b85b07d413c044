"""What a sequence has in each pass of a call."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.cache_layout import columns_for
from orthrus_gguf.runtime.ggml.inputs import ShareRows
from orthrus_gguf.runtime.ggml.shape import Share
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import View
from orthrus_gguf.runtime.sequences import OneSequence
from orthrus_gguf.runtime.trees import padded_stores


def rows_of(own: OneSequence[GgmlCache], pieces: Sequence[Piece]) -> ShareRows:
    """Its rows in one pass."""
    return ShareRows(pieces, own.end, own.tree)


def share_of(own: OneSequence[GgmlCache], pieces: Sequence[Piece]) -> Share:
    """The same for the graph, with as many columns as its rows and blocks reach."""
    ar = diffusion = stores = reach = 0
    for piece in pieces:
        if piece.segment.view is View.AR:
            ar, reach = piece.count, piece.start + piece.count
        else:
            diffusion += piece.count
            reach = max(reach, own.end + piece.offset + piece.count)
    if own.tree is not None:
        reach, stores = own.tree.columns, padded_stores(len(own.tree.stores))
    columns = min(columns_for(reach), own.cache.rows)
    return Share(own.cache.serial, ar, diffusion, columns, stores)
