"""Masks: those of a row are those of its path, whatever tree it stands in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_gguf.drafting.forced import Forcing
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.server.grammars import (
    Calls,
    Grammars,
    Thought,
    from_gbnf,
    from_regex,
    from_schema,
    reply,
)
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer

SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
TEXT = '{"name": "read", "size": 12}'


@pytest.fixture(scope="module")
def tokenizer(demo_file: Callable[..., Path]) -> Tokenizer:
    with ModelFile.open(demo_file("q8_0")) as file:
        return load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer)


def allowed(mask: Any) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return {int(token) for token in np.flatnonzero(bits)}


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_row_has_the_mask_of_its_path(
    grammars: Grammars, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Rows behind a token that is not allowed cannot be reached, and are not looked at."""
    good = tokenizer.encode(TEXT)
    done = data.draw(st.integers(0, len(good)))
    nodes = data.draw(st.integers(1, 8))
    tokens, parents = [], []
    depth = [0]
    for row in range(1, nodes + 1):
        parent = data.draw(st.integers(max(0, row - 3), row - 1))
        right = good[done + depth[parent] :][:1] or [0]
        tokens.append(data.draw(st.sampled_from([*right * 3, 7, 300, *tokenizer.eog])))
        parents.append(parent)
        depth.append(depth[parent] + 1)
    prompt = [1, 2, 3]
    grammar = from_schema(SCHEMA)
    constraint = grammars.constraint(grammar, len(prompt))
    if done:  # in two steps, as decoding does
        constraint([*prompt, *good[: done // 2]], Tree(()))
    masks = constraint([*prompt, *good[:done]], Tree(tuple(tokens), tuple(parents)))
    reachable = {0: list(good[:done])}
    for row, (token, parent) in enumerate(zip(tokens, parents, strict=True), start=1):
        if parent in reachable and token in allowed(masks[parent]) - tokenizer.eog:
            reachable[row] = [*reachable[parent], token]
    for row, path in reachable.items():
        alone = grammars.constraint(grammar, len(prompt))
        expected = alone([*prompt, *path], Tree(()))[0]
        assert allowed(masks[row]) == allowed(expected)
    # And the same constraint goes on as if the tree had not been.
    after = constraint([*prompt, *good[:done]], Tree(()))
    assert allowed(after[0]) == allowed(masks[0])


def test_a_whole_text_ends_with_an_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    good = tokenizer.encode(TEXT)
    constraint = grammars.constraint(from_schema(SCHEMA), 0)
    for end, token in enumerate(good):
        assert token in allowed(constraint(good[:end], Tree(()))[0])
    last = allowed(constraint(good, Tree(()))[0])
    assert last
    assert last <= tokenizer.eog


def test_leaving_it_is_an_error(grammars: Grammars) -> None:
    constraint = grammars.constraint(from_regex("a+"), 0)
    with pytest.raises(OrthrusError, match="grammar was left"):
        constraint([7, 8, 9], Tree(()))


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (from_regex, "("),
        (from_regex, "[z-a]"),
        (from_gbnf, "root ::= ("),
        (from_gbnf, "root ::= nowhere"),
        (from_schema, {"type": "nope"}),
        (from_schema, {"$ref": "#/nowhere"}),
    ],
)
def test_what_is_no_grammar(make: Any, source: Any) -> None:
    with pytest.raises(OrthrusError) as caught:
        make(source)
    assert "\n" not in str(caught.value)


def test_what_must_come_is_a_draft(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """A name in quotes is forced once its first letter is there; values are not."""
    schema = {
        "type": "object",
        "properties": {"description": {"type": "integer"}},
        "required": ["description"],
        "additionalProperties": False,
    }
    constraint = grammars.constraint(from_schema(schema), 0)
    assert isinstance(constraint, Forcing)
    start = tokenizer.encode("{")
    constraint(start, Tree(()))
    forced = constraint.forced([*start, *tokenizer.encode('"')])
    assert "description".startswith(tokenizer.decode(forced).strip(' "')[:11])
    assert len(forced) >= 2
    assert not isinstance(grammars.constraint(from_schema(schema), 0, drafts=False), Forcing)


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 3}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g", "arguments": {"any": [1]}}\n</tool_call>'
TOOLS: Any = {
    "f": {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    },
    "g": {},
}


def said(grammars: Grammars, tokenizer: Tokenizer, grammar: str, text: str) -> bool | None:
    """Whether a text is whole under a grammar; None if it leaves it."""
    tokens = tokenizer.encode(text, special=False, add_bos=False)
    constraint = grammars.constraint(grammar, 0)
    for end, token in enumerate(tokens):
        if token not in allowed(constraint(tokens[:end], Tree(()))[0]):
            return None
    return bool(allowed(constraint(tokens, Tree(()))[0]) & tokenizer.eog)


@pytest.mark.parametrize(
    ("required", "several", "schema", "text", "whole"),
    [
        (True, True, None, CALL, True),
        (True, True, None, CALL + "\n" + OTHER, True),
        (True, False, None, CALL + "\n" + OTHER, None),
        (True, True, None, "So: " + CALL, None),
        (False, True, None, "a <tool_ call> of x < 3", True),
        (False, True, None, "So:\n" + CALL + "\n" + OTHER + " and so on", True),
        (False, True, None, "So: " + CALL.partition("}")[0], False),
        (False, True, None, "So: <tool_call>x", None),
        (False, True, None, "So: " + CALL.replace("3", '"3"'), None),
        (False, True, None, CALL.replace('"f"', '"h"'), None),
        (False, False, None, "So: " + CALL + " done", True),
        (False, False, None, CALL + CALL, None),
        (False, True, {"type": "integer"}, "12", True),
        (False, True, {"type": "integer"}, CALL, True),
        (False, True, {"type": "integer"}, "12 " + CALL, None),
    ],
)
def test_calls(
    grammars: Grammars,
    tokenizer: Tokenizer,
    required: bool,
    several: bool,
    schema: Any,
    text: str,
    whole: bool | None,
) -> None:
    """Calls that must come, that may stand in a text, or take the place of an answer."""
    calls = Calls(TOOLS, several, required)
    grammar = reply(Thought.NONE, calls, schema)
    assert said(grammars, tokenizer, grammar, text) is whole
    after = reply(Thought.MAYBE, calls, schema)
    assert said(grammars, tokenizer, after, text) is whole
    thought = "<think>\nno <tool_call> yet</think>\n\n"
    assert said(grammars, tokenizer, after, thought + text) is whole
    begun = reply(Thought.BEGUN, calls, schema)
    assert said(grammars, tokenizer, begun, thought.removeprefix("<think>") + text) is whole


def test_a_call_in_a_text_is_forced_from_its_tag_on(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    constraint = grammars.constraint(reply(Thought.NONE, Calls({"f": {}}, True, False)), 0)
    assert isinstance(constraint, Forcing)
    tokens = tokenizer.encode("So: ", add_bos=False)
    assert constraint.forced(tokens) == []
    tokens += tokenizer.encode("<tool_call>", special=False, add_bos=False)
    assert tokenizer.decode(constraint.forced(tokens)).startswith("\n{")
