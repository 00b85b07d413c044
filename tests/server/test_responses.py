"""OpenAI's Responses with OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import Live

TEXT = "def read(self, size=-1):"
SEEDED: Any = {"model": "demo", "input": TEXT, "extra_body": {"seed": 3}}
TOOL: Any = {
    "type": "function",
    "name": "open_file",
    "description": "Opens a file",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"mode": {"enum": ["r", "w"]}},
        "required": ["mode"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_the_text_is_that_of_chat_completions(client: openai.OpenAI) -> None:
    whole = client.responses.create(**SEEDED, max_output_tokens=40)
    assert (whole.status, whole.usage and whole.usage.output_tokens) == ("incomplete", 40)
    chat = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": TEXT}], seed=3, max_tokens=40
    )
    assert whole.output_text == chat.choices[0].message.content
    with client.responses.stream(**SEEDED, max_output_tokens=40) as stream:
        kinds, text = [], ""
        for event in stream:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
            if event.type == "response.incomplete":
                assert event.response.output_text == text == whole.output_text
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_structure(client: openai.OpenAI) -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "mode", "schema": TOOL["parameters"]}}
    found = client.responses.create(**SEEDED, text=wanted, reasoning={"effort": "none"})
    assert found.status == "completed"
    assert json.loads(found.output_text)["mode"] in ("r", "w")


def test_tools_and_their_results(client: openai.OpenAI) -> None:
    settings: Any = {
        **SEEDED,
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "none"},
    }
    (call,) = client.responses.create(**settings).output
    assert call.type == "function_call"
    assert call.name == "open_file"
    with client.responses.stream(**settings) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "opened"}
    items: Any = [{"role": "user", "content": TEXT}, call.model_dump(), result]
    found = client.responses.create(model="demo", input=items, tools=[TOOL], max_output_tokens=3)
    assert found.usage is not None
    assert found.usage.output_tokens == 3


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_errors(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{**SEEDED, **changes})
    assert caught.value.param == param
