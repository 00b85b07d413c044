"""Where cycles of decoding begin, on texts to train on.

`auto` asks the heads for a draft where their last one ended and lookups have nothing to say, and
hardly anywhere else: what a base writes repeats itself, so most positions are none of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.drafting.lookup import MOST, LookupDrafter
from orthrus_gguf.training.answers import Answer
from orthrus_gguf.training.blocks import draw_anchors

Places = NDArray[np.int64]


def behind_lookups(answer: Answer) -> Places:
    """For every position of a text from the first that an anchor may have: where a block is asked
    for, once lookups have nothing. The last position stands for none."""
    tokens, first, last = answer.tokens, answer.n_prompt - 1, len(answer.tokens) - 1
    lookup, seen, ends = LookupDrafter(), list(tokens[:first]), []
    for at in range(first, last):
        seen.append(tokens[at])
        found = lookup.propose(seen, min(last - at, MOST))
        ends.append(min(at + 1 + _agree(found[0].tokens, tokens[at + 1 :]), last) if found else at)
    behind = np.arange(first, last + 1)
    for i in reversed(range(len(ends))):
        if ends[i] > first + i:
            behind[i] = behind[ends[i] - first]
    return behind


def _agree(draft: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens of a draft are accepted."""
    count = 0
    for drafted, said in zip(draft, text, strict=False):
        if drafted != said:
            break
        count += 1
    return count


class Cycles:
    """Anchors for blocks that are trained where they are used.

    On every text run as many cycles as it gets blocks: at each visit they go on where the drafts
    before ended. Those that came to the end begin anew, anywhere that lookups have nothing.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        #: Text → where its cycles go on. What a checkpoint must hold.
        self.places: dict[int, list[int]] = {}
        self._behind = {answer.index: behind_lookups(answer) for answer in answers}
        counts = np.array([len(self._open(answer)) for answer in answers])
        #: How often each text is to be visited: by the positions that it has for blocks.
        self.shares: NDArray[np.float64] | None = counts / counts.sum() if counts.any() else None

    def anchors(self, answer: Answer, count: int, rng: np.random.Generator) -> Places:
        """As `draw_anchors`, which it is for texts of which lookups know everything."""
        anywhere = self._open(answer)
        if not len(anywhere):
            return draw_anchors(answer, count, rng)
        begun = self.places.pop(answer.index, [])[:count]
        anew = rng.choice(anywhere, count - len(begun))
        return np.sort(np.concatenate([np.array(begun, np.int64), anew]))

    def went(self, answer: Answer, anchors: Places, accepted: Places) -> None:
        """Of the blocks at `anchors`, so many drafts each were accepted."""
        first, last = answer.n_prompt - 1, len(answer.tokens) - 1
        ends = self._behind[answer.index][np.minimum(anchors + accepted + 1, last) - first]
        self.places[answer.index] = ends[ends < last].tolist()

    def _open(self, answer: Answer) -> Places:
        """Where lookups have nothing."""
        behind = self._behind[answer.index]
        places: Places = np.arange(len(behind)) + answer.n_prompt - 1
        return np.asarray(places[behind == places][:-1])
