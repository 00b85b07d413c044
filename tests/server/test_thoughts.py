"""Thoughts that may have so many tokens: where they end, with and without drafts and grammars."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Live

from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.server.grammars import Grammars, Thought, from_schema, reply
from orthrus_gguf.server.thoughts import Bound, Bounded, BoundedForcing, bounded
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_file: Callable[..., Path]) -> Tokenizer:
    with ModelFile.open(demo_file("q8_0")) as file:
        return load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)


def bound(tokenizer: Tokenizer, budget: int) -> Bound:
    return Bound(tokenizer, tuple(tokenizer.encode("</think>")), budget)


def musts(
    tokenizer: Tokenizer, budget: int, ids: Sequence[int], *, begun: bool
) -> list[int | None]:
    """After each beginning of an answer, the only token that may follow; None: any may."""
    constraint = Bounded(bound(tokenizer, budget), None, 0, begun=begun)
    found: list[int | None] = []
    for end in range(len(ids) + 1):
        masks = constraint(ids[:end], Tree(()))
        found.append(None if masks is None else only(masks[0]))
    return found


def only(mask: Any) -> int:
    (token,) = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(token)


class TestPlaces:
    @pytest.mark.parametrize("budget", [0, 1, 5])
    @pytest.mark.parametrize("begun", [True, False])
    def test_what_closes_a_thought_comes_behind_the_budget(
        self, tokenizer: Tokenizer, budget: int, begun: bool
    ) -> None:
        opening = [] if begun else tokenizer.encode("\n<think>")
        closing = tokenizer.encode("</think>")
        thought = tokenizer.encode("import os\nimport sys\n")[:budget]
        said = tokenizer.encode("\n<think> and so on without an end")
        free: list[None] = [None]
        expected = [*free * (len(opening) + len(thought)), *closing, *free * (len(said) + 1)]
        ids = [*opening, *thought, *closing, *said]
        assert musts(tokenizer, budget, ids, begun=begun) == expected

    def test_a_thought_that_ends_by_itself_is_left_alone(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("import</think>\n" + "x = 1\n" * 20)
        assert set(musts(tokenizer, 8, ids, begun=True)) == {None}

    @pytest.mark.parametrize("text", ["x = 1\n" * 9, "<thin king", "x<think>"])
    def test_what_is_no_thought_has_no_bound(self, tokenizer: Tokenizer, text: str) -> None:
        assert set(musts(tokenizer, 2, tokenizer.encode(text), begun=False)) == {None}

    @pytest.mark.parametrize("letter", ["é", "€", "😀"])
    def test_no_character_is_cut(self, tokenizer: Tokenizer, letter: str) -> None:
        ids = tokenizer.encode(letter)
        assert len(ids) > 1
        first = tokenizer.encode("</think>")[0]
        expected = [None] * len(ids) + [first]
        assert musts(tokenizer, 1, ids, begun=True) == expected
        assert musts(tokenizer, len(ids), ids, begun=True) == expected


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_row_has_the_mask_of_its_path(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Whatever tree it stands in, and however the tokens before were committed."""
    closing = tokenizer.encode("</think>")
    thought = tokenizer.encode("import os")
    budget = data.draw(st.integers(0, len(thought)))
    good = [*thought[:budget], *closing, *tokenizer.encode("x = 1")]
    done = data.draw(st.integers(0, len(good)))
    tokens: list[int] = []
    parents: list[int] = []
    paths: dict[int, list[int]] = {0: good[:done]}
    for row in range(1, data.draw(st.integers(1, 8)) + 1):
        parent = data.draw(st.integers(max(0, row - 3), row - 1))
        right = good[len(paths[parent]) :][:1] or [7]
        tokens.append(data.draw(st.sampled_from([*right * 3, 7, 300])))
        parents.append(parent)
        paths[row] = [*paths[parent], tokens[-1]]
    begun = data.draw(st.booleans())
    prompt = [1, 2, 3]
    constraint = Bounded(bound(tokenizer, budget), None, len(prompt), begun=begun)
    constraint([*prompt, *good[: done // 2]], Tree(()))
    masks = constraint([*prompt, *good[:done]], Tree(tuple(tokens), tuple(parents)))
    for row, path in paths.items():
        alone = Bounded(bound(tokenizer, budget), None, len(prompt), begun=begun)
        expected = alone([*prompt, *path], Tree(()))
        if expected is None:
            assert masks is None or (masks[row] == 0xFFFFFFFF).all()
        else:
            assert masks is not None
            assert only(masks[row]) == only(expected[0])


class TestBesideGrammars:
    def test_the_thought_ends_and_the_grammar_goes_on(self, tokenizer: Tokenizer) -> None:
        grammar = reply(Thought.BEGUN, schema={"const": {"size": 1}})
        inner = Grammars(tokenizer).constraint(grammar, 0)
        constraint = bounded(bound(tokenizer, 3), inner, 0, begun=True, drafts=True)
        assert isinstance(constraint, BoundedForcing)
        thought = tokenizer.encode("import os and more")[:3]
        closing = tokenizer.encode("</think>")
        assert list(constraint.forced(thought)) == closing
        masks = constraint(thought, Tree((closing[0],)))
        assert masks is not None
        assert [only(row) for row in masks] == closing[:2]
        behind = [*thought, *closing]
        masks = constraint(behind, Tree(()))
        assert masks is not None
        allowed = np.unpackbits(masks[0].view(np.uint8), bitorder="little")
        assert allowed[tokenizer.encode("{")[0]]
        assert not allowed[tokenizer.encode("x")[0]]
        assert list(constraint.forced([*behind, *tokenizer.encode('{"s')]))

    def test_what_a_grammar_forbids_does_not_come(self, tokenizer: Tokenizer) -> None:
        """It binds the whole answer: there is no thought in it."""
        grammars = Grammars(tokenizer)
        grammar = from_schema({"type": "integer"})
        both = Bounded(bound(tokenizer, 0), grammars.constraint(grammar, 0), 0, begun=True)
        masks, alone = both([], Tree(())), grammars.constraint(grammar, 0)([], Tree(()))
        assert masks is not None
        assert (masks == alone).all()


PLANS: list[Any] = [{"enabled": False}, {"strategy": "two-pass", "width": 5}, {"strategy": "fused"}]


def answer(server: Live, path: str, **body: Any) -> Any:
    messages = [{"role": "user", "content": "def read(self):"}]
    body = {"messages": messages, "seed": 5, "max_tokens": 24, **body}
    status, found = server.post(path, body)
    assert status == 200, found
    return found


CHAT = "/v1/chat/completions"


class TestServer:
    def test_drafts_change_nothing(self, server: Live, tokenizer: Tokenizer) -> None:
        """The thought is as long as it may be, and then something is said."""
        body = {"enable_thinking": True, "temperature": 0.9}
        free = answer(server, CHAT, **body)["choices"][0]["message"]
        assert not free["content"]
        bounded = {**body, "reasoning_budget_tokens": 9}
        found = [answer(server, CHAT, **bounded, speculative=plan) for plan in PLANS]
        messages = [one["choices"][0]["message"] for one in found]
        assert messages[0] == messages[1] == messages[2]
        assert free["reasoning_content"].startswith(messages[0]["reasoning_content"])
        assert messages[0]["content"]
        assert found[1]["timings"]["draft_n"] > 0
        assert [one["usage"]["completion_tokens"] for one in found] == [24] * 3
        thought = tokenizer.encode(messages[0]["reasoning_content"])
        assert 0 < len(thought) <= 9

    def test_spellings(self, server: Live) -> None:
        """All of them give one and the same text."""
        thinks = {"enable_thinking": True}
        wanted = answer(server, CHAT, **thinks, reasoning_budget_tokens=9)["choices"][0]["message"]
        for more in ({"thinking_budget_tokens": 9}, {"reasoning": {"max_tokens": 9}}):
            assert answer(server, CHAT, **thinks, **more)["choices"][0]["message"] == wanted
        thinking = {"type": "enabled", "budget_tokens": 9}
        thought, said = answer(server, "/v1/messages", thinking=thinking)["content"]
        assert thought["thinking"] == wanted["reasoning_content"]
        assert said["text"] == wanted["content"]

    def test_json_behind_a_thought(self, server: Live) -> None:
        """With drafts and without."""
        schema = {"type": "object", "properties": {"size": {"enum": [1, 2]}}, "required": ["size"]}
        wanted = {"type": "json_schema", "json_schema": {"schema": {**schema}}}
        body = {"enable_thinking": True, "reasoning_budget_tokens": 6, "response_format": wanted}
        found = [answer(server, CHAT, **body, speculative=plan) for plan in PLANS]
        messages = [one["choices"][0]["message"] for one in found]
        assert messages[0] == messages[1] == messages[2]
        assert messages[0]["reasoning_content"]
        assert json.loads(messages[0]["content"])["size"] in (1, 2)

    def test_none_at_all(self, server: Live) -> None:
        """The template's own way to say so."""
        wanted = answer(server, CHAT, enable_thinking=False)["choices"][0]["message"]
        assert "reasoning_content" not in wanted
        effort = {"effort": "none"}
        for more in (
            {"reasoning_effort": "none"},
            {"reasoning": effort},
            {"reasoning_budget_tokens": 0},
        ):
            assert answer(server, CHAT, **more)["choices"][0]["message"] == wanted

    def test_nonsense(self, server: Live) -> None:
        for more in ({"reasoning_budget_tokens": -2}, {"reasoning": {"max_tokens": "x"}}):
            body = {"messages": [{"role": "user", "content": "a"}], **more}
            status, found = server.post(CHAT, body)
            assert status == 400
            assert found["error"]["param"].split(".")[0] in more
