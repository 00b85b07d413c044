"""Blocks are trained where `auto` asks for them, and rows by what they bring."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from orthrus_gguf.drafting.lookup import LookupDrafter
from orthrus_gguf.training.answers import Answer
from orthrus_gguf.training.blocks import reach
from orthrus_gguf.training.cycles import Cycles, behind_lookups


def text(index: int, n_vocab: int, length: int = 60, n_prompt: int = 5) -> Answer:
    tokens = np.random.default_rng(index).integers(0, n_vocab, length).tolist()
    return Answer(index, "text", n_prompt, tuple(tokens), held=False)


def walked(answer: Answer, at: int) -> int:
    """Where a block is asked for, cycle by cycle, each with a drafter that knows the text so far
    and nothing else."""
    tokens, last = answer.tokens, len(answer.tokens) - 1
    while at < last:
        found = LookupDrafter().propose(tokens[: at + 1], last - at)
        if not found:
            return at
        draft = found[0].tokens
        rest = tokens[at + 1 :]
        at += 1 + next((i for i, t in enumerate(rest) if draft[i : i + 1] != (t,)), len(rest))
    return last


@pytest.mark.parametrize("n_vocab", [2, 3, 4])
def test_blocks_are_asked_for_where_lookups_have_nothing(n_vocab: int) -> None:
    answer = text(1, n_vocab)
    first, last = answer.n_prompt - 1, len(answer.tokens) - 1
    found = behind_lookups(answer)
    assert found.tolist() == [walked(answer, at) for at in range(first, last + 1)]
    assert 0 < sum(found == range(first, last + 1)) - 1 < last - first  # some, and not all


def test_cycles_go_on_where_drafts_ended() -> None:
    answer = text(2, 3)
    last = len(answer.tokens) - 1
    cycles, rng = Cycles([answer]), np.random.default_rng(0)
    anchors = cycles.anchors(answer, 6, rng)
    assert all(walked(answer, at) == at for at in anchors)
    cycles.went(answer, anchors, np.arange(6))
    ends = [walked(answer, min(at + i + 1, last)) for i, at in enumerate(anchors.tolist())]
    going = [at for at in ends if at < last]
    assert going
    assert cycles.places == {answer.index: going}
    # Fewer blocks, and a second visit before the first is over: it begins anew.
    assert cycles.anchors(answer, 2, rng).tolist() == sorted(going[:2])
    again = cycles.anchors(answer, 40, rng)
    assert all(walked(answer, at) == at for at in again)
    assert len(again) == 40
    assert len(set(again.tolist())) > 4


def test_a_cycle_at_the_end_begins_anew() -> None:
    answer = text(3, 1000)  # lookups have nothing anywhere
    cycles = Cycles([answer])
    last = len(answer.tokens) - 1
    cycles.went(answer, np.array([last - 1, last - 3, 10]), np.array([0, 7, 2]))
    assert cycles.places == {answer.index: [13]}
    assert 13 in cycles.anchors(answer, 3, np.random.default_rng(0))


def test_texts_are_visited_by_the_blocks_that_they_ask_for() -> None:
    known = Answer(7, "text", 5, (1,) * 60, held=False)
    varied, mixed = text(8, 1000), text(9, 3)
    cycles = Cycles([known, varied, mixed])
    asked = [sum(walked(a, at) == at for at in range(4, 59)) for a in (known, varied, mixed)]
    assert asked[:2] == [0, 55]
    assert cycles.shares is not None
    np.testing.assert_allclose(cycles.shares, [count / sum(asked) for count in asked])
    # One that is drawn all the same, as lookups know all of every text, has blocks anywhere.
    alone = Cycles([known])
    assert alone.shares is None
    assert len(set(alone.anchors(known, 20, np.random.default_rng(0)).tolist())) > 5


def test_rows_count_by_the_drafts_that_they_bring() -> None:
    """By every outcome of a block: a row's weight is how many drafts at it and behind it are
    accepted on average."""
    likely = torch.tensor([[[0.9, 0.2, 0.6, 0.4, 0.7]]])
    live = torch.ones(1, 1, 5, dtype=torch.bool)
    sure = ((1 + likely) / 2)[0, 0].tolist()
    expected = np.zeros(5)
    for hits in product((True, False), repeat=4):  # the fifth draft is not verified
        share = np.prod([p if hit else 1 - p for p, hit in zip(sure, hits, strict=False)])
        accepted = next((i for i, hit in enumerate(hits) if not hit), 4)
        expected[:accepted] += share * (accepted - np.arange(accepted))
    np.testing.assert_allclose(reach(likely, live)[0, 0], expected, rtol=1e-6)
    live[..., 2:] = False  # the text ends
    first, both = sure[0], sure[0] * sure[1]
    np.testing.assert_allclose(reach(likely, live)[0, 0], [first + both, both, 0, 0, 0], rtol=1e-6)
