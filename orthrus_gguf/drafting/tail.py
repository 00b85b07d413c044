"""The tail: what a draft said further on than the token that was refused."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.drafter import Results
from orthrus_gguf.drafting.sequence import TokenSequence

TAIL = Source("tail", "stale tail", "#CC79A7", 0.4)


class TailDrafter:
    """Offers what the last cycle's draft left.

    If the token after the accepted ones is the draft's own, the rest goes on as it was meant, and
    keeps its source. Otherwise it is a stale tail: it was written for another token, but often fits
    all the same.
    """

    taps = ()

    def __init__(self, sequence: TokenSequence) -> None:
        self._rest: Draft | None = None

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft]:
        return () if self._rest is None else (self._rest,)

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        self._rest = None
        if cycle is None or not len(rest := cycle.draft.after(cycle.accepted + 1)):
            return
        meant = cycle.draft.tokens[: cycle.accepted + 1] == cycle.tokens
        self._rest = rest if meant else Draft(TAIL, rest.tokens, rest.confidence, rest.second)
