"""Which tokens of a prompt stay: chunks by score, until the share is reached."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]

#: Tokens of a chunk, which stays or goes as a whole.
CHUNK = 32

#: Tokens that a score is the mean over: what stands beside something that matters, matters.
SMOOTHED = 13

#: Tokens that always stay: the first (attention rests on them), and the last (most of all, they say
#: what to do).
FIRST, LAST = 16, 64


def may_go(inside: Bools) -> Bools:
    """Tokens that may be dropped. inside: those that stand in a message's text."""
    found: Bools = inside.copy()
    found[:FIRST] = False
    found[max(len(found) - LAST, 0) :] = False
    return found


def smoothed(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means over a window around each token; at the edges over what there is of it."""
    window = np.ones(SMOOTHED)
    sums = np.convolve(scores, window, "full")[SMOOTHED // 2 :][: len(scores)]
    counts = np.convolve(np.ones(len(scores)), window, "full")[SMOOTHED // 2 :][: len(scores)]
    return (sums / counts).astype(np.float32)


def choose(scores: NDArray[np.float32], droppable: Bools, keep: float) -> Bools:
    """Which tokens stay: all that may not be dropped, and chunks of the others, those with the
    largest smoothed score first (the earlier one of two alike), until they are a share `keep` of
    them.

    scores: float32 [tokens], none negative. droppable: bool [tokens].
    """
    stay = ~droppable
    wanted = math.ceil(keep * int(droppable.sum()))
    score = np.where(droppable, smoothed(scores), -1)
    score = np.pad(score, (0, -len(score) % CHUNK), constant_values=-1)
    best = score.reshape(-1, CHUNK).max(axis=1)
    for chunk in np.argsort(-best, kind="stable"):
        if wanted <= 0:
            break
        place = slice(int(chunk) * CHUNK, (int(chunk) + 1) * CHUNK)
        wanted -= int(droppable[place].sum())
        stay[place] = True
    return stay
