"""Which replica answers what."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from orthrus_gguf.cluster.affinity import Affinity, Held, marks
from orthrus_gguf.cluster.prefixes import PIECE, prefix

SYSTEM = {"role": "system", "content": "You are brief. " * 200}


def turn(*texts: str, system: bool = False) -> dict[str, Any]:
    """A conversation whose messages say this."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [SYSTEM, *said] if system else said}


def sent(affinity: Affinity, body: Any) -> str:
    """Where a request goes, as a router has it go there."""
    name = affinity.ranked(prefix(body))[0]
    affinity.began(name)
    affinity.holds(name, marks(prefix(body)))
    return name


def affinity(*names: str, slack: int = 2) -> Affinity:
    found = Affinity(slack)
    found.update(names or ("a", "b", "c"))
    return found


def test_a_next_turn_has_all_places_of_the_turn_before() -> None:
    first, second = prefix(turn("hi", system=True)), prefix(turn("hi", "ho", "hu", system=True))
    assert second[: len(first)] == first
    assert len(second) == len(first) + 2
    assert prefix(turn("ha", system=True))[:-1] == first[:-1]
    assert prefix(turn("ha", system=True))[-1] != first[-1]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x" * 1000},
        {"prompt": ["x" * 1000]},
        {"prompt": [7] * 500},
        {"input": "x" * 1000, "instructions": "be brief"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 1000}]}]},
    ],
)
def test_long_texts_have_places_inside(body: Any) -> None:
    (name,) = {"prompt", "input", "messages"} & body.keys()
    found = prefix(body)
    assert max(b.end - a.end for a, b in pairwise(found)) <= PIECE
    assert len(found) >= 4
    longer = json.loads(json.dumps(body).replace("x" * 1000, "x" * 1300).replace("7]", "7, 8]"))
    assert 3 <= len({*found} & {*prefix({**body, name: longer[name]})}) < len(found)


def test_what_changes_from_turn_to_turn_is_no_part_of_a_prompt() -> None:
    marked = turn("hi")
    marked["messages"][0]["cache_control"] = {"type": "ephemeral"}
    assert prefix(marked) == prefix(turn("hi"))
    assert prefix({**turn("hi"), "temperature": 1, "seed": 3}) == prefix(turn("hi"))
    assert prefix({**turn("hi"), "system": "be brief"}) != prefix(turn("hi"))
    assert prefix({**turn("hi"), "tools": [{"name": "f"}]}) != prefix(turn("hi"))


def test_claude_codes_billing_block_is_no_part_of_a_prompt() -> None:
    def body(count: int) -> Any:
        block = {"type": "text", "text": f"x-anthropic-billing-header: cc={count}"}
        return {**turn("hi"), "system": [block, {"type": "text", "text": "be brief"}]}

    assert prefix(body(1)) == prefix(body(2))


@pytest.mark.parametrize(
    "body", [None, 3, [], {}, {"messages": []}, {"prompt": ""}, {"prompt": None}]
)
def test_bodies_without_a_prompt(body: Any) -> None:
    assert prefix(body) == ()
    assert {*affinity().ranked(())} == {"a", "b", "c"}


def test_halves_of_surrogate_pairs() -> None:
    assert prefix({"prompt": "\ud800"}) != prefix({"prompt": "\ud801"})


def test_conversations_stay_where_they_are() -> None:
    """However short the question and long the answer; and others go elsewhere."""
    found = affinity()
    homes = {text: sent(found, turn(text)) for text in ("one", "two", "three")}
    assert {*homes.values()} == {"a", "b", "c"}
    for text, home in homes.items():
        found.ended(home)
        assert sent(found, turn(text, "long answer " * 500, "and then?")) == home


def test_a_system_prompt_alone_draws_nobody() -> None:
    """It does where most of the prompt is it."""
    found = affinity()
    home = sent(found, turn("one", system=True))
    assert sent(found, turn("two" * 4000, system=True)) != home
    assert sent(found, turn("three", system=True)) == home


def test_a_busy_holder_is_left() -> None:
    found = affinity(slack=2)
    home = sent(found, turn("one"))
    assert [sent(found, turn("one")) for _ in range(2)] == [home, home]
    other = sent(found, turn("one"))
    assert other != home
    for _ in range(3):
        found.ended(home)
    assert found.ranked(prefix(turn("one")))[0] in (home, other)


def test_load_is_spread() -> None:
    found = affinity()
    homes = [sent(found, turn(f"text {i}")) for i in range(30)]
    assert {homes.count(name) for name in "abc"} == {10}


def test_the_dead_hold_nothing() -> None:
    found = affinity("a", "b")
    home = sent(found, turn("one"))
    found.gone(home)
    (left,) = found.replicas
    assert left != home
    assert sent(found, turn("one")) == left
    found.update(["a", "b"])
    found.ended(left)
    assert found.ranked(prefix(turn("one")))[0] == left
    found.holds("nobody", marks(prefix(turn("two"))))
    found.ended("nobody")
    assert {*found.replicas} == {"a", "b"}


def test_reports_tell_a_new_door_what_is_held() -> None:
    held = Held()
    held.add(marks(prefix(turn("one"))))
    found = affinity()
    found.holds("c", held.newest(100))
    assert found.ranked(prefix(turn("one", "answer " * 100, "two")))[0] == "c"


def test_the_oldest_places_are_forgotten() -> None:
    held, first = Held(most=8), prefix({"prompt": "x" * PIECE * 4})
    held.add(marks(first))
    assert held.worth(first) == PIECE * 4
    held.add(marks(prefix({"prompt": "y" * PIECE * 4})))
    assert held.worth(first) == PIECE * 4
    held.add(marks(prefix({"prompt": "z" * PIECE})))
    assert held.worth(first) == 0
    assert len(held) == 8
    assert held.newest(1) == marks(prefix({"prompt": "z" * PIECE}))
