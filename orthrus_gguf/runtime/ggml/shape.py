"""What passes have in common that can use the same graph. Plain data, no ggml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from orthrus_gguf.runtime.protocol import OWN_VIEWS, View


class Share(NamedTuple):
    """What one sequence has in a pass.

    cache: its cache's serial number. ar_rows, diffusion_rows: its rows of each view. columns: cache
    rows that its attention spans, hidden ones included. stores: keys that a tree writes, some rows'
    at several places; 0 where each row's are written once.
    """

    cache: int
    ar_rows: int
    diffusion_rows: int
    columns: int
    stores: int = 0

    @property
    def rows(self) -> int:
        return self.ar_rows + self.diffusion_rows


@dataclass(frozen=True)
class Group:
    """Consecutive rows of a pass that attend together: those of one view in one share.

    share: its number. first: among the pass's rows of this view. own_first: among the share's rows.
    count: of rows.
    """

    share: int
    first: int
    own_first: int
    count: int


@dataclass(frozen=True)
class Span:
    """All rows of one view in a pass: `count` rows from row `first` on, in groups."""

    view: View
    first: int
    count: int
    groups: tuple[Group, ...]


class Shape(NamedTuple):
    """The key of a graph.

    shares: the sequences'. In a pass, AR rows come first, share by share, then diffusion rows.
    wanted: rows whose logits are wanted, over all. taps: see `protocol.Segment`, over all segments.
    """

    shares: tuple[Share, ...]
    wanted: int
    taps: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return sum(share.rows for share in self.shares)

    @property
    def ar_rows(self) -> int:
        return sum(share.ar_rows for share in self.shares)

    def is_about(self, cache: int) -> bool:
        """Whether the cache of this serial number has a share."""
        return any(share.cache == cache for share in self.shares)

    def spans(self) -> list[Span]:
        """The rows of the views present, in order."""
        found, row = [], 0
        for view in OWN_VIEWS:
            groups, count = [], 0
            for number, share in enumerate(self.shares):
                own_first = 0 if view is View.AR else share.ar_rows
                rows = share.ar_rows if view is View.AR else share.diffusion_rows
                if rows:
                    groups.append(Group(number, count, own_first, rows))
                count += rows
            if count:
                found.append(Span(view, row, count, tuple(groups)))
            row += count
        return found
