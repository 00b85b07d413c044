"""States that a cache can go back to: those of recurrent layers cannot be turned back."""

from __future__ import annotations

from typing import Generic, TypeVar

from orthrus_gguf.runtime.protocol import Checkpoint

#: Rows between checkpoints that a cache makes by itself; how many it keeps, and in how many bytes.
CHECKPOINT_ROWS = 256
KEPT = 32
KEPT_BYTES = 1 << 30

S = TypeVar("S")


class Checkpoints(Generic[S]):
    """States by their place, the newest that KEPT and KEPT_BYTES allow, but always the last two."""

    def __init__(self, each: int) -> None:
        """each: bytes of a state."""
        self._each = each
        self._kept: dict[int, S] = {}

    def due(self, length: int) -> bool:
        """Whether it is time to keep another one."""
        return length - max(self._kept, default=0) >= CHECKPOINT_ROWS

    def keep(self, place: int, state: S) -> None:
        """Remember a state, and forget the oldest beyond the budget."""
        self._kept[place] = state
        while len(self._kept) > max(2, min(KEPT, KEPT_BYTES // self._each)):
            del self._kept[min(self._kept)]

    def latest(self, length: int) -> int:
        """The last place up to `length`: at worst the beginning, which needs no state."""
        return max((place for place in self._kept if place <= length), default=0)

    def reach(self, place: Checkpoint, now: int) -> Checkpoint:
        """Where a cache of `now` rows can go back to, `place` or the last one before it."""
        return place if place.length == now else Checkpoint(self.latest(place.length))

    def check(self, length: int, now: int) -> None:
        """Raise ValueError unless a cache of `now` rows can go back to its first `length`."""
        if not 0 <= length <= now or self.reach(Checkpoint(length), now).length != length:
            raise ValueError(f"no checkpoint at {length}: the state of that place is not kept")

    def get(self, place: int) -> S | None:
        """The state of a place; None if it is not kept."""
        return self._kept.get(place)

    def forget_behind(self, place: int) -> None:
        """Drop what lies behind a place."""
        self._kept = {at: state for at, state in self._kept.items() if at <= place}

    def clear(self) -> None:
        """Drop all."""
        self._kept = {}
