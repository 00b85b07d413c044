"""Stop strings: nothing of them is shown, nothing else is lost, whatever the pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text.stop import StopStrings

TEXT = st.text("ab\n", max_size=30)


@given(text=TEXT, stops=st.lists(st.text("ab\n", min_size=1, max_size=4)), data=st.data())
def test_any_split_shows_the_text_before_the_first_stop(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    scanner, shown, fed = StopStrings(stops), "", ""
    while fed != text and scanner.hit is None:
        size = data.draw(st.integers(1, len(text) - len(fed)))
        piece = text[len(fed) : len(fed) + size]
        fed += piece
        shown += scanner.push(piece)
    shown += scanner.flush()
    ends = [fed.find(s) for s in stops if s in fed]
    assert shown == (fed[: min(ends)] if ends else fed)
    assert (scanner.hit is None) == (not ends)


@given(text=TEXT)
def test_text_is_held_back_only_while_undecided(text: str) -> None:
    scanner = StopStrings(["\n\n"])
    shown = scanner.push(text)
    if "\n\n" not in text:
        assert shown == (text[:-1] if text.endswith("\n") else text)


def test_nothing_comes_after_a_hit() -> None:
    scanner = StopStrings(["END"])
    assert scanner.push("one EN") == "one "
    assert scanner.push("D two") == ""
    assert scanner.hit == "END"
    assert scanner.push("three") + scanner.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(OrthrusError, match="must not be empty"):
        StopStrings([""])
