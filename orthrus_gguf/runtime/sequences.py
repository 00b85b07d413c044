"""What a call asks of each sequence, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.cache_layout import CacheLayout
from orthrus_gguf.runtime.host_cache import HostCache
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import Segment, View, check_segments
from orthrus_gguf.runtime.trees import TreeLayout, tree_layout

C = TypeVar("C", bound=HostCache)


@dataclass
class OneSequence(Generic[C]):
    """One sequence in a call.

    end: where rows of its blocks go in its cache: behind all AR rows of the call. reach: cache rows
    that its attention may see at most. ar: its AR segment; tree: how that lies if it is a tree.
    """

    cache: C
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


def sequences_of(
    segments: Sequence[Segment], kind: type[C], layout: CacheLayout
) -> dict[int, OneSequence[C]]:
    """The sequences of a call by their cache's id, in order; what was pending is dropped.

    kind, layout: of the caches of the model that runs them: its very own layout, not one that is
    equal. Raises ValueError for another cache, or a closed one.
    """
    found: dict[int, OneSequence[C]] = {}
    for segment in segments:
        cache, rows = segment.cache, len(segment)
        own = found.get(id(cache))
        if own is None:
            if not isinstance(cache, kind) or cache.closed:
                raise ValueError("the cache is closed, or belongs to another runtime")
            if cache.layout is not layout:
                raise ValueError("the cache belongs to another model")
            cache.drop()
            own = found[id(cache)] = OneSequence(cache, cache.length, cache.length)
        own.reach += rows
        if segment.view is View.AR:
            own.ar = segment
            own.end += rows
    return found


def by_sequence(
    pieces: Sequence[Piece], sequences: dict[int, OneSequence[C]]
) -> list[tuple[OneSequence[C], Sequence[Piece]]]:
    """The pieces of a pass, sequence by sequence in the order of the call."""
    if len(sequences) == 1:
        return [(own, pieces) for own in sequences.values()]
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(id(piece.segment.cache), []).append(piece)
    return [(own, found[key]) for key, own in sequences.items() if key in found]


def check_call(segments: Sequence[Segment], config: ModelConfig, block_rows: int) -> None:
    """Raise what is wrong with a call: OrthrusError for what users can do something about, else
    ValueError. block_rows: the most rows of a block."""
    check_segments(segments)
    for segment in segments:
        low, high = min(segment.tokens), max(segment.tokens)
        if low < 0 or high >= config.n_vocab:
            raise OrthrusError(
                f"token {low if low < 0 else high} is outside the vocabulary of "
                f"{config.n_vocab}; the tokenizer does not belong to this model"
            )
        if segment.taps and not (
            0 <= min(segment.taps) <= max(segment.taps) <= config.n_layers + 1
        ):
            raise ValueError(f"taps {segment.taps}: expected 0..{config.n_layers + 1}")
        if segment.view is View.DIFFUSION:
            if not config.has_heads:
                raise OrthrusError(f"{config.name} has no diffusion heads; use --strategy ar")
            if len(segment) > block_rows:
                raise ValueError(f"block of {len(segment)} rows, at most {block_rows} fit")
