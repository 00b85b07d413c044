"""How the segments of one call are cut into passes."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_kernels.products.dispatch import MAX_ROWS

from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import Segment, View

#: Rows of the passes that graphs are captured for: few sizes, so that few graphs serve all.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


def bucket(rows: int) -> int:
    """Rows of the pass that `rows` rows run in."""
    if not rows:
        return 0
    return next((size for size in BUCKETS if size >= rows), rows)


def padded(ar: int, blocks: int, most: int) -> tuple[int, int]:
    """Rows by view of the pass that so many rows run in, in buckets where these fit into `most`."""
    for sizes in ((bucket(ar), bucket(blocks)), (bucket(ar), blocks)):
        if sum(sizes) <= most:
            return sizes
    return ar, blocks


def power(count: int, least: int = 1) -> int:
    """The next power of two, for tables whose size is in the key of a graph."""
    return max(least, 1 << (max(count, 1) - 1).bit_length())


def is_prompt(pieces: Sequence[Piece]) -> bool:
    """Whether the pass takes the path for prompts: more AR rows than the fused products are for."""
    first = pieces[0]
    chain = first.segment.view is View.AR and first.segment.parents is None
    return chain and first.count > MAX_ROWS


def cut(
    segments: Sequence[Segment], prompt_rows: int, pass_rows: int, *, draws: bool
) -> list[list[Piece]]:
    """Passes in order: of up to `prompt_rows` AR rows alone, or of up to `pass_rows` mixed rows.

    The segments keep their order, so that the rows that a block sees are in the cache by then. A
    chain may be cut anywhere, since its rows do not depend on their company, but not a tree, and
    not a block, whose rows see one another. A block that nothing is asked about leaves no trace and
    does not run. draws: no pass draws more than `pass_rows` rows, so a prompt that wants more is
    cut like that.
    """
    passes: list[list[Piece]] = []
    for index, segment in enumerate(segments):
        rows = len(segment)
        if segment.view is View.DIFFUSION or segment.parents is not None:
            if segment.view is View.AR or segment.wanted or segment.taps:
                _place(passes, Piece(index, segment, 0, rows), pass_rows)
            continue
        size = prompt_rows
        if draws and len(segment.wanted) > pass_rows:
            size = min(size, pass_rows)
        for first in range(0, rows, size):
            piece = Piece(index, segment, first, min(size, rows - first))
            if first:
                passes.append([piece])
            else:
                _place(passes, piece, pass_rows)
    return passes


def _place(passes: list[list[Piece]], piece: Piece, pass_rows: int) -> None:
    """Into the last pass if it fits there; a prompt stays alone."""
    held = sum(other.count for other in passes[-1]) if passes else pass_rows
    prompt = is_prompt([piece]) or (bool(passes) and is_prompt(passes[-1]))
    if prompt or held + piece.count > pass_rows:
        passes.append([])
    passes[-1].append(piece)
