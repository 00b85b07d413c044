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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.config import ModelConfig

Logits = NDArray[np.float32]


class View(Enum):
    """Which of the two sets of attention weights a row uses."""

    AR = "ar"
    DIFFUSION = "diffusion"


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one view.

    tokens: token ids, one per row (never empty).
    start: position of the first row; equally the number of cache rows that the first row sees.
    wanted: the rows whose logits are wanted, as a range over the segment's rows. Runtimes skip the
        head for all others.
    """

    view: View
    tokens: tuple[int, ...]
    start: int
    wanted: range

    def __post_init__(self) -> None:
        if not self.tokens or self.start < 0:
            raise ValueError(f"segment needs rows and a start >= 0: {self}")
        if self.wanted.step != 1 or not 0 <= self.wanted.start <= self.wanted.stop <= len(self):
            raise ValueError(f"wanted rows {self.wanted} outside the segment's {len(self)} rows")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def stop(self) -> int:
        """Position after the last row."""
        return self.start + len(self.tokens)


def ar_segment(tokens: Sequence[int], start: int, *, wanted: range | None = None) -> Segment:
    """Causal rows from `start`, appended to the cache. All logits wanted unless said."""
    rows = tuple(tokens)
    return Segment(View.AR, rows, start, range(len(rows)) if wanted is None else wanted)


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
            visible = segment.stop
        elif segment.start > visible:
            raise ValueError(
                f"diffusion block at {segment.start} sees rows that do not exist yet ({visible})"
            )
