"""Segments: the rows of one forward pass, and what every runtime promises about them.

A forward pass takes a list of segments. Projections and attention differ by view; norms, MLP,
embedding and head are shared, so a runtime may run them over all rows at once.

- An `View.AR` segment is causal: its row i sits at position `start + i`, sees the cache rows
  `0 .. start-1` and the segment's own rows up to itself, and is appended to the cache. Its logits
  must be *row-invariant*: bit for bit what the same row gives in a pass of its own.
- A `View.DIFFUSION` segment is a block: row i sits at position `start + i` and sees the cache rows
  `0 .. start-1` and the whole block, in both directions. Nothing of it is stored. When the same
  pass holds an AR segment, "the cache rows" include the rows that this AR segment appends, which
  is what lets verification and the next draft share a pass.
- An AR segment may be a *tree*: alternatives for the same positions, verified in one pass. Each of
  its rows but the first has a parent in the segment, sees the cache and its ancestors, and sits one
  position after its parent. Row-invariant as ever: the bits of a row are those it gives when its
  path is the text. Nothing of a tree is appended until `TreeCache.keep_path` says which path stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.model.config import ModelConfig

Logits = NDArray[np.float32]


class View(Enum):
    """Which of the two sets of attention weights a row uses."""

    AR = "ar"
    DIFFUSION = "diffusion"


@dataclass(frozen=True)
class Segment:
    """Rows of one view, consecutive unless they are a tree.

    tokens: token ids, one per row (never empty).
    start: position of the first row; equally the number of cache rows that the first row sees.
    wanted: the rows whose logits are wanted, as a range over the segment's rows. Runtimes skip the
        head for all others.
    parents: of a tree, the row that each row follows, which comes before it; -1 for row 0, the
        only root. None: every row follows the one before it.
    """

    view: View
    tokens: tuple[int, ...]
    start: int
    wanted: range
    parents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tokens or self.start < 0:
            raise ValueError(f"segment needs rows and a start >= 0: {self}")
        if self.wanted.step != 1 or not 0 <= self.wanted.start <= self.wanted.stop <= len(self):
            raise ValueError(f"wanted rows {self.wanted} outside the segment's {len(self)} rows")
        if self.parents is not None and (
            self.view is not View.AR
            or len(self.parents) != len(self)
            or self.parents[0] != -1
            or not all(0 <= parent < i + 1 for i, parent in enumerate(self.parents[1:]))
        ):
            raise ValueError(f"not a tree of {len(self)} AR rows with one root: {self.parents}")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def stop(self) -> int:
        """The position after the last one that a row has."""
        return self.start + (len(self) if self.parents is None else max(depths(self.parents)) + 1)


def depths(parents: Sequence[int]) -> list[int]:
    """How many ancestors each row of a tree has."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def path_to(row: int, parents: Sequence[int]) -> list[int]:
    """The row of a tree and its ancestors, the root first."""
    path = [row]
    while (row := parents[row]) >= 0:
        path.append(row)
    return path[::-1]


def check_path(rows: Sequence[int], parents: Sequence[int]) -> None:
    """Raise ValueError unless `rows` are a path of the tree, from its root on."""
    known = bool(rows) and 0 <= rows[-1] < len(parents)
    if not known or list(rows) != path_to(rows[-1], parents):
        raise ValueError(f"rows {list(rows)} are no path of the last pass's tree: {list(parents)}")


def ar_segment(
    tokens: Sequence[int],
    start: int,
    *,
    wanted: range | None = None,
    parents: Sequence[int] | None = None,
) -> Segment:
    """Causal rows from `start`, or a tree of them. All logits wanted unless said."""
    rows = tuple(tokens)
    tree = None if parents is None else tuple(parents)
    return Segment(View.AR, rows, start, range(len(rows)) if wanted is None else wanted, tree)


def diffusion_segment(
    anchor: int, mask: int, rows: int, start: int, *, wanted: range | None = None
) -> Segment:
    """A diffusion block `[anchor, mask, ..., mask]` of `rows` rows, its anchor at `start`."""
    tokens = (anchor,) + (mask,) * (rows - 1)
    return Segment(View.DIFFUSION, tokens, start, range(rows) if wanted is None else wanted)


@runtime_checkable
class Cache(Protocol):
    """The AR keys and values of the committed tokens, shared by both views."""

    @property
    def length(self) -> int:
        """Number of rows held: positions `0 .. length-1`."""
        ...

    @property
    def capacity(self) -> int:
        """Largest number of rows (the context size)."""
        ...

    def truncate(self, length: int) -> None:
        """Drop the rows from `length` on; `length` must not exceed the current one."""
        ...

    def append(self, rows: int) -> None:
        """Count `rows` more rows as held, whatever is in them. For passes, and to time passes."""
        ...


@runtime_checkable
class TreeCache(Cache, Protocol):
    """A cache of a runtime that verifies trees."""

    def fit_tree(self, parents: Sequence[int]) -> int:
        """How many rows of a tree, from the first on, the next pass has room for: at least 1."""
        ...

    def keep_path(self, rows: Sequence[int]) -> None:
        """Append a path of the tree that the last pass ran, from its row 0 on; drop its other rows.

        Raises ValueError if `rows` is no such path, or if anything else came between.
        """
        ...


class Model(Protocol):
    """One loaded model on one runtime. Runtimes differ in speed and arithmetic, not in meaning."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def description(self) -> str:
        """One line for status output: runtime, device, threads, weight types."""
        ...

    def close(self) -> None:
        """Free what the model holds; neither it nor its caches may be used afterwards."""
        ...

    def new_cache(self, capacity: int) -> Any:
        """An empty cache for up to `capacity` rows. Raises OrthrusError when it cannot fit."""
        ...

    def forward(self, segments: Sequence[Segment], cache: Any) -> list[Logits]:
        """Run one pass and return, per segment, the logits of its wanted rows.

        At most one AR segment per pass, listed first; it must start at `cache.length` and is
        appended. Diffusion segments must start at or before the cache length after that append.
        A tree appends nothing and has its pass to itself; `TreeCache.keep_path` appends of it.
        Returns float32 arrays of shape [len(segment.wanted), vocab_size]. The arrays may be reused
        by the next pass: copy what must outlive it.
        """
        ...


def check_segments(segments: Sequence[Segment], cache: Cache) -> None:
    """Raise ValueError unless `segments` obey the contract of `Model.forward` on this cache."""
    if not segments:
        raise ValueError("a pass needs at least one segment")
    visible = cache.length
    for index, segment in enumerate(segments):
        if segment.view is View.AR:
            if index != 0:
                raise ValueError("an AR segment must be the first and only one of its pass")
            if segment.start != cache.length:
                raise ValueError(
                    f"AR segment starts at {segment.start}, the cache holds {cache.length} rows"
                )
            if segment.stop > cache.capacity:
                raise ValueError(
                    f"AR segment ends at {segment.stop}, the cache has room for {cache.capacity}"
                )
            if segment.parents is not None:
                if not isinstance(cache, TreeCache):
                    raise ValueError("this runtime has no ancestor masks: it verifies chains only")
                if len(segments) > 1:
                    raise ValueError("a tree shares its pass with no diffusion block")
            visible = segment.stop
        elif segment.start > visible:
            raise ValueError(
                f"diffusion block at {segment.start} sees rows that do not exist yet ({visible})"
            )
