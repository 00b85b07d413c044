"""Which tokens of a prompt stay."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from orthrus_gguf.prefill.choice import CHUNK, FIRST, LAST, SMOOTHED, choose, may_go, smoothed

COUNT = 640
EVERY = may_go(np.ones(COUNT, bool))


def peaks(*places: int) -> NDArray[np.float32]:
    scores = np.full(COUNT, 1e-4, np.float32)
    for rank, place in enumerate(places):
        scores[place] = 1 - 0.1 * rank
    return scores


def test_ends_always_stay() -> None:
    assert not EVERY[:FIRST].any()
    assert not EVERY[COUNT - LAST :].any()
    assert EVERY[FIRST : COUNT - LAST].all()
    assert not may_go(np.ones(LAST, bool)).any()
    stay = choose(peaks(), EVERY, 0.05)
    assert stay[:FIRST].all()
    assert stay[COUNT - LAST :].all()


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.99, 1.0])
def test_the_share_is_reached_and_no_chunk_more(keep: float) -> None:
    stay = choose(np.random.default_rng(0).random(COUNT).astype(np.float32), EVERY, keep)
    kept = int((stay & EVERY).sum())
    assert keep * EVERY.sum() <= kept < keep * EVERY.sum() + CHUNK


def test_what_scores_stays_with_its_whole_chunk() -> None:
    """The largest scores first; what is next to the edge of a chunk takes the neighbour along."""
    middle, edge = 5 * CHUNK + CHUNK // 2, 9 * CHUNK
    stay = choose(peaks(middle, edge), EVERY, 3 * CHUNK / EVERY.sum())
    chunks = np.flatnonzero((stay & EVERY).reshape(-1, CHUNK).any(axis=1))
    assert chunks.tolist() == [5, 8, 9]
    one = choose(peaks(edge, middle), EVERY, CHUNK / EVERY.sum())
    assert np.flatnonzero((one & EVERY).reshape(-1, CHUNK).any(axis=1))[0] in (8, 9)


def test_the_earlier_of_two_alike_stays() -> None:
    stay = choose(np.full(COUNT, 0.5, np.float32), EVERY, 0.01)
    assert np.flatnonzero(stay & EVERY).tolist() == list(range(FIRST, CHUNK))


def test_what_may_not_go_stays_whatever_it_scores() -> None:
    droppable = EVERY.copy()
    droppable[200:300] = False
    stay = choose(peaks(400), droppable, 0.05)
    assert stay[200:300].all()
    assert stay[400]
    assert not stay[(np.arange(COUNT) > 320) & (np.arange(COUNT) < 380)].any()


def test_scores_are_means_over_a_window() -> None:
    scores = np.random.default_rng(1).random(50).astype(np.float32)
    half = SMOOTHED // 2
    expected = [scores[max(i - half, 0) : i + half + 1].mean() for i in range(50)]
    np.testing.assert_allclose(smoothed(scores), expected, rtol=1e-6)
    np.testing.assert_allclose(smoothed(scores[:3]), [scores[:3].mean()] * 3, rtol=1e-6)
