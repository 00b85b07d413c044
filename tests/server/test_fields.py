"""Bodies: what is read, what is refused and how it is named, and that the schema says the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from orthrus_gguf.server.api_errors import ApiError
from orthrus_gguf.server.fields import Within, read, schema


@dataclass(kw_only=True)
class Leaf:
    """A leaf."""

    kind: Literal["a", "b"]
    size: Annotated[int, Within(0, 9)] = 1


@dataclass(kw_only=True)
class Body:
    """A body."""

    text: str
    ratio: float | None = None
    stop: str | list[str] | None = None
    leaves: Annotated[list[Leaf], Within(1)] = field(default_factory=list)
    mixed: str | list[Leaf | int] = ""
    bias: dict[str, float] = field(default_factory=dict)
    free: Any = None
    on: bool = False


def test_what_is_read() -> None:
    data = {
        "text": "x",
        "ratio": 1,
        "stop": ["a", "b"],
        "leaves": [{"kind": "a"}, {"kind": "b", "size": 9, "unknown": {}}],
        "mixed": [{"kind": "a"}, 3],
        "bias": {"7": 2},
        "free": [None, {"a": 1}],
        "on": None,
        "unknown": 1,
    }
    assert read(Body, data) == Body(
        text="x",
        ratio=1.0,
        stop=["a", "b"],
        leaves=[Leaf(kind="a"), Leaf(kind="b", size=9)],
        mixed=[Leaf(kind="a"), 3],
        bias={"7": 2.0},
        free=[None, {"a": 1}],
    )


@pytest.mark.parametrize(
    ("data", "param", "words"),
    [
        ([], "body", "expected an object, found a list"),
        ({}, "text", "is required"),
        ({"text": None}, "text", "is required"),
        ({"text": 1}, "text", "expected a text, found 1"),
        ({"text": "", "on": 1}, "on", "expected true or false, found 1"),
        ({"text": "", "ratio": True}, "ratio", "expected a number, found True"),
        ({"text": "", "ratio": 10**400}, "ratio", "expected a number"),
        ({"text": "", "stop": [1]}, "stop[0]", "expected a text, found 1"),
        ({"text": "", "stop": 1}, "stop", "expected a text or a list of a text, found 1"),
        ({"text": "", "leaves": []}, "leaves", "a length of 1 or more, found 0"),
        ({"text": "", "leaves": [{"kind": "c"}]}, "leaves[0].kind", "'a' or 'b', found 'c'"),
        ({"text": "", "leaves": [{"kind": []}]}, "leaves[0].kind", "found a list"),
        ({"text": "", "leaves": [{"kind": "a", "size": 10}]}, "leaves[0].size", "0 to 9"),
        ({"text": "", "leaves": [{"kind": "a", "size": 1.5}]}, "leaves[0].size", "whole number"),
        ({"text": "", "mixed": [{"kind": "a", "size": -1}]}, "mixed[0].size", "0 to 9"),
        ({"text": "", "bias": {"7": "x"}}, "bias.7", "expected a number"),
    ],
)
def test_what_is_wrong_is_named(data: Any, param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(Body, data)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")
    assert words in caught.value.message


def test_schema() -> None:
    known: dict[str, Any] = {}
    assert schema(Body, known) == {"$ref": "#/components/schemas/Body"}
    properties = known["Body"]["properties"]
    assert known["Body"]["required"] == ["text"]
    assert properties["ratio"] == {"anyOf": [{"type": "number"}, {"type": "null"}]}
    assert properties["leaves"] == {
        "type": "array",
        "items": {"$ref": "#/components/schemas/Leaf"},
        "minItems": 1,
    }
    assert properties["free"] == {}
    assert known["Leaf"]["properties"] == {
        "kind": {"enum": ["a", "b"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 9},
    }
