"""Prompt lookup: when the last tokens have occurred before, what followed them is a draft.

Costs no pass, so it pays even where drafts from the diffusion view do not, and text that repeats
itself (code, lists, quotes of the prompt) is full of it. The idea is prompt lookup decoding (Saxena
2023); here every generated token joins the index too.
"""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.drafter import Results
from orthrus_gguf.drafting.sequence import TokenSequence

LOOKUP = Source("lookup", "look-up", "#D55E00", 0.7, margin=1.1)

#: Tokens that must agree, the longer match first; shorter ones would mostly be chance.
LENGTHS = (6, 3)

#: Tokens of a draft at most: twice as many as are ever verified at once.
MOST = 64


class LookupDrafter:
    """Where runs of 6 and of 3 tokens last ended, for one growing list of tokens.

    Made for microseconds per token: on a small model, plain decoding takes only hundreds.
    """

    taps = ()

    def __init__(self, sequence: TokenSequence | None = None) -> None:
        """sequence: nothing is asked of it."""
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft]:
        """What followed the longest known run that `tokens` end with: as many tokens as there is
        room for, but no more than MOST.

        `tokens` must extend the list of the call before. The confidence of a lookup is what the
        length of its match suggests; statistics correct it.
        """
        self._extend(tokens)
        room = min(room, MOST)
        for length in LENGTHS:
            end = self._ends.get(tuple(tokens[-length:]))
            if end is not None:
                found = tuple(tokens[end : end + room])
                # Where the text repeats with a period shorter than `room`, it is unrolled.
                while len(found) < room:
                    found += tuple(tokens[end:])[: room - len(found)]
                return (Draft(LOOKUP, found, (1 - 0.5 ** (length - 1),) * len(found)),)
        return ()

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        """Tokens are indexed when a draft is wanted."""

    def _extend(self, tokens: Sequence[int]) -> None:
        # The run that ends the list is left out: it would find itself.
        for end in range(max(self._indexed, LENGTHS[-1]), len(tokens)):
            for length in LENGTHS:
                if length <= end:
                    self._ends[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
