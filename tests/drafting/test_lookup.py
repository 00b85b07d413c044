"""Lookups: what followed the last tokens before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import ToyModel

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft
from orthrus_gguf.drafting.drafter import Results
from orthrus_gguf.drafting.lookup import LENGTHS, LOOKUP, MOST, LookupDrafter
from orthrus_gguf.sampling import SamplingSettings


def found(drafter: LookupDrafter, tokens: list[int], room: int) -> Draft | None:
    """What is proposed, if anything."""
    proposed = drafter.propose(tokens, room)
    assert len(proposed) <= 1
    return proposed[0] if proposed else None


def made() -> LookupDrafter:
    return LookupDrafter(ToyModel(heads=False).sequence([1], SamplingSettings()))


def by_hand(tokens: list[int]) -> int | None:
    """Where the latest earlier occurrence of the longest run that ends `tokens` ended."""
    for length in LENGTHS:
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                return end
    return None


@given(
    tokens=st.lists(st.integers(0, 2), max_size=40),
    steps=st.lists(st.integers(1, 5), max_size=10),
    most=st.integers(1, 12),
)
def test_the_longest_latest_match_is_continued(
    tokens: list[int], steps: list[int], most: int
) -> None:
    """However the list has grown between the calls."""
    index = made()
    at = 0
    for step in [*steps, len(tokens)]:
        at = min(at + step, len(tokens))
        known = tokens[:at]
        end, draft = by_hand(known), found(index, known, most)
        if end is None:
            assert draft is None
            continue
        assert draft is not None
        assert len(draft) == most
        period = known[end:]
        assert list(draft.tokens) == [period[i % len(period)] for i in range(most)]


def test_longer_matches_are_trusted_more() -> None:
    index = made()
    short = found(index, [1, 2, 3, 9, 8, 1, 2, 3], 2)
    assert short is not None
    assert short.tokens == (9, 8)
    long = found(made(), [1, 2, 3, 4, 5, 6, 9, 8, 1, 2, 3, 4, 5, 6], 2)
    assert long is not None
    assert long.confidence[0] > short.confidence[0]


@pytest.mark.parametrize("tokens", [[], [1], [1, 1, 1], [1, 2, 1, 2]])
def test_two_tokens_are_no_match(tokens: list[int]) -> None:
    assert found(made(), tokens, 5) is None


def test_no_more_is_drafted_than_is_ever_of_use() -> None:
    draft = found(made(), [1, 2, 3, 9, 8, 1, 2, 3], 100_000)
    assert draft is not None
    assert len(draft) == len(draft.confidence) == MOST
    assert draft.tokens[:7] == (9, 8, 1, 2, 3, 9, 8)


def test_tokens_join_the_index_when_a_draft_is_wanted() -> None:
    """Cycles between need not ask."""
    index = made()
    tokens = [1, 2, 3, 9]
    assert found(index, tokens, 3) is None
    for token in (8, 7, 1, 2):
        tokens.append(token)
        index.committed(tokens, Cycle(len(tokens) - 2, (), 0, (token,)), Results())
    tokens.append(3)
    draft = found(index, tokens, 3)
    assert draft is not None
    assert (draft.source, draft.tokens) == (LOOKUP, (9, 8, 7))
