"""Prompt lookup: when the last tokens have occurred before, what followed them is a draft.

Costs no pass, so it pays even where drafts from the diffusion view do not, and text that repeats
itself (code, lists, quotes of the prompt) is full of it. The idea is prompt lookup decoding (Saxena
2023); here every generated token joins the index too.
"""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.drafting.draft import Draft, Source

#: Tokens that must agree, the longer match first; shorter ones would mostly be chance.
LENGTHS = (6, 3)


class LookupIndex:
    """Where runs of 6 and of 3 tokens last ended, for one growing list of tokens.

    Made for microseconds per token: on a small model, plain decoding takes only hundreds.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def draft(self, tokens: Sequence[int], most: int) -> Draft | None:
        """Up to `most` tokens that followed the longest known run that `tokens` end with.

        `tokens` must extend the list of the call before. The confidence of a lookup is what the
        length of its match suggests; statistics correct it.
        """
        self._extend(tokens)
        for length in LENGTHS:
            end = self._ends.get(tuple(tokens[-length:]))
            if end is not None and most > 0:
                found = tuple(tokens[end : end + most])
                # Where the text repeats with a period shorter than `most`, it is unrolled.
                while len(found) < most:
                    found += tuple(tokens[end:])[: most - len(found)]
                return Draft(Source.LOOKUP, found, (1 - 0.5 ** (length - 1),) * len(found))
        return None

    def _extend(self, tokens: Sequence[int]) -> None:
        # The run that ends the list is left out: it would find itself.
        for end in range(max(self._indexed, LENGTHS[-1]), len(tokens)):
            for length in LENGTHS:
                if length <= end:
                    self._ends[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
