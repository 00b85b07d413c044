"""Anthropic's endpoints with Anthropic's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from live_server import Live

MESSAGES: Any = [{"role": "user", "content": "def read(self, size=-1):"}]
TOOL: Any = {
    "name": "open_file",
    "description": "Opens a file",
    "input_schema": {
        "type": "object",
        "properties": {"mode": {"enum": ["r", "w"]}},
        "required": ["mode"],
        "additionalProperties": False,
    },
}
SEEDED: Any = {"model": "demo", "messages": MESSAGES, "extra_body": {"seed": 3}}


@pytest.fixture
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as found:
        yield found


def test_the_text_is_the_same_in_all_apis(client: anthropic.Anthropic, server: Live) -> None:
    whole = client.messages.create(**SEEDED, max_tokens=40)
    (block,) = whole.content
    assert block.type == "text"
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 40)
    with client.messages.stream(**SEEDED, max_tokens=40) as stream:
        assert "".join(stream.text_stream) == block.text
        last = stream.get_final_message()
    assert last.stop_reason == "max_tokens"
    assert last.usage.output_tokens == 40
    body = {"messages": MESSAGES, "seed": 3, "max_tokens": 40}
    _, found = server.post("/v1/chat/completions", body)
    assert found["choices"][0]["message"]["content"] == block.text


def test_stop_sequences(client: anthropic.Anthropic) -> None:
    (block,) = client.messages.create(**SEEDED, max_tokens=40).content
    assert block.type == "text"
    stop = block.text[8:12]
    cut = client.messages.create(**SEEDED, max_tokens=40, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == block.text[: block.text.index(stop)]


def test_tokens_are_counted_as_they_are_used(client: anthropic.Anthropic) -> None:
    settings: Any = {"model": "demo", "messages": MESSAGES, "system": "Be brief.", "tools": [TOOL]}
    count = client.messages.count_tokens(**settings).input_tokens
    usage = client.messages.create(**settings, max_tokens=1).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == count


def test_a_block_that_changes_does_not_spoil_the_cache(client: anthropic.Anthropic) -> None:
    def count(*billing: str) -> int:
        system: Any = [{"type": "text", "text": text} for text in (*billing, "Be brief.")]
        return client.messages.count_tokens(
            model="demo", messages=MESSAGES, system=system
        ).input_tokens

    assert count("x-anthropic-billing-header: cc_version=1; abc") == count()
    assert count("more") > count()


def test_thoughts_are_blocks_of_their_own(client: anthropic.Anthropic) -> None:
    """The prompt begins a thought, which the demo model does not end."""
    settings: Any = {**SEEDED, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    (block,) = client.messages.create(**settings, max_tokens=20).content
    assert block.type == "thinking"
    assert block.thinking
    with client.messages.stream(**settings, max_tokens=20) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.thinking == block.thinking  # type: ignore[union-attr]


class TestTools:
    settings: Any = {  # noqa: RUF012
        **SEEDED,
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "open_file", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled"},
        "max_tokens": 200,
    }

    def test_a_call_streamed_and_not(self, client: anthropic.Anthropic) -> None:
        whole = client.messages.create(**self.settings)
        (call,) = whole.content
        assert call.type == "tool_use"
        assert whole.stop_reason == "tool_use"
        assert call.name == "open_file"
        assert call.input in ({"mode": "r"}, {"mode": "w"})
        with client.messages.stream(**self.settings) as stream:
            (streamed,) = stream.get_final_message().content
        assert streamed.type == "tool_use"
        assert (streamed.name, streamed.input) == (call.name, call.input)

    def test_its_result_goes_back(self, client: anthropic.Anthropic) -> None:
        call: Any = client.messages.create(**self.settings).content[0]
        result: Any = {
            "type": "tool_result",
            "tool_use_id": call.id,
            "content": [{"type": "text", "text": "opened"}],
        }
        turns: Any = [
            *MESSAGES,
            {"role": "assistant", "content": [call.model_dump(exclude_none=True)]},
            {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
        ]
        found = client.messages.create(
            model="demo",
            messages=turns,
            tools=[TOOL],
            max_tokens=3,
        )
        assert found.usage.output_tokens == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, r"messages\[0\].role"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\]"),
    ],
)
def test_errors(client: anthropic.Anthropic, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as caught:
        client.messages.create(**{"max_tokens": 5, **SEEDED, **changes})
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
