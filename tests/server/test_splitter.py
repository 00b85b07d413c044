"""Thoughts, words and calls come apart alike, however the text is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthrus_gguf.server.splitter import Part, Splitter

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa}\\"ris"}}\n</tool_call>'
TIME = '<tool_call>\n{"arguments": {}, "name": "time"}\n</tool_call>'


def split(text: str, cuts: list[int], **how: bool) -> dict[object, str]:
    splitter = Splitter(**{"thinking": False, "tools": True, **how})
    edges = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    deltas = [d for a, b in pairwise(edges) for d in splitter.push(text[a:b])]
    found: dict[object, str] = {}
    for delta in [*deltas, *splitter.flush()]:
        called = delta.part in (Part.CALL, Part.ARGUMENTS)
        key = (delta.part, delta.index) if called else delta.part
        found[key] = found.get(key, "") + delta.text
    return found


CASES = [
    ("Hello <b> world\n", {}, {Part.CONTENT: "Hello <b> world\n"}, False),
    ("<think>\nhm\n</think>\n\nYes", {}, {Part.REASONING: "hm", Part.CONTENT: "Yes"}, True),
    ("hm\n</think>\n\nYes", {"thinking": True}, {Part.REASONING: "hm", Part.CONTENT: "Yes"}, True),
    ("cut in thou", {"thinking": True}, {Part.REASONING: "cut in thou"}, True),
    ("a <think> b", {}, {Part.CONTENT: "a <think> b"}, True),
    (
        f"Let me see.\n{WEATHER}\n{TIME}",
        {},
        {
            Part.CONTENT: "Let me see.",
            (Part.CALL, 0): "weather",
            (Part.ARGUMENTS, 0): '{"city": "Pa}\\"ris"}',
            (Part.CALL, 1): "time",
            (Part.ARGUMENTS, 1): "{}",
        },
        True,
    ),
    (
        "<tool_call>\nnonsense\n</tool_call> more",
        {},
        {Part.CONTENT: "<tool_call>\nnonsense\n</tool_call> more"},
        True,
    ),
    (WEATHER, {"tools": False}, {Part.CONTENT: WEATHER}, True),
]


@pytest.mark.parametrize(("text", "how", "expected", "strip"), CASES)
@given(cuts=st.lists(st.integers(0, 120), max_size=9))
def test_splits(
    text: str, how: dict[str, bool], expected: dict[object, str], strip: bool, cuts: list[int]
) -> None:
    found = split(text, cuts, **how)
    if strip:
        found = {key: value.strip() for key, value in found.items()}
    assert found == expected


def test_arguments_stream() -> None:
    """They are told before the call is complete."""
    splitter = Splitter(thinking=False, tools=True)
    deltas = splitter.push('<tool_call>\n{"name": "f", "arguments": {"text": "a long')
    assert [delta.part for delta in deltas] == [Part.CALL, Part.ARGUMENTS]
    assert deltas[1].text == '{"text": "a long'
    rest = splitter.push(' one"}}\n</tool_call>') + splitter.flush()
    text = "".join(d.text for d in [*deltas[1:], *rest])
    assert json.loads(text) == {"text": "a long one"}
