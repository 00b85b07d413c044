"""orthrus-server --prefill-drafter: what is kept of prompts, and that every result says so."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, live

CODE = (Path(__file__).parents[2] / "orthrus_gguf" / "sampling.py").read_text("utf-8")[:3000]
BODY: dict[str, Any] = {"prompt": CODE, "n_predict": 8, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": CODE}], "max_tokens": 3}
RESPONSE: dict[str, Any] = {"input": CODE, "max_output_tokens": 3}


@pytest.fixture(scope="module")
def shortening(chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    flags = ("--prefill-drafter", "self:2", "--prefill-threshold", 100, "--prefill-keep", 0.1)
    more = ("-np", 2, "-c", 2048, "--strategy", "ar", "--metrics")
    with live(chat_file, tmp_path_factory.mktemp("prefill"), *flags, *more) as server:
        yield server


def answered(server: Live, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, found = server.post(path, body)
    assert status == 200, found
    assert isinstance(found, dict)
    return found


def streamed(server: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of an answer."""
    data = json.dumps({**body, "stream": True}).encode()
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data), timeout=60) as got:
        lines = [line[6:] for line in got.read().decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def counter(server: Live, name: str) -> float:
    page = server.get("/metrics")[1].splitlines()
    return float(
        next(line for line in page if line.startswith(f"llamacpp:{name}_total ")).split()[1]
    )


def test_prompts_are_shortened_as_requests_ask(shortening: Live) -> None:
    server = shortening
    found = answered(server, "/completion", BODY)
    kept = found["timings"]["prefill"]
    assert kept["lossy"] is True
    assert found["tokens_evaluated"] == kept["kept_tokens"] < kept["prompt_tokens"] / 3
    for prefill in ({"enabled": False}, {"keep": 1}, {"threshold": 2000}):
        whole = answered(server, "/completion", {**BODY, "prefill": prefill})
        assert "prefill" not in whole["timings"]
        assert whole["tokens_evaluated"] == kept["prompt_tokens"]
    half = answered(server, "/completion", {**BODY, "prefill": {"keep": 0.5}})
    assert half["timings"]["prefill"]["kept_tokens"] > 2 * kept["kept_tokens"]
    refused(server, {**BODY, "prefill": {"keep": 0}}, "expected a share")
    refused(server, {**BODY, "prefill": {"threshold": 2048}}, "no prompt is longer")


def test_a_conversation_goes_on_with_what_was_kept(shortening: Live) -> None:
    messages = [{"role": "system", "content": CODE[:600]}, {"role": "user", "content": CODE}]
    chat: dict[str, Any] = {"messages": messages, "max_tokens": 6, "temperature": 0}
    first = answered(shortening, "/v1/chat/completions", chat)
    assert first["timings"]["prefill"]["scored_tokens"] > 1000
    messages += [first["choices"][0]["message"], {"role": "user", "content": "import re"}]
    second = answered(shortening, "/v1/chat/completions", chat)
    assert second["timings"]["prefill"]["scored_tokens"] == 0
    assert second["timings"]["cache_n"] >= first["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completion", BODY),
        ("/v1/completions", {"prompt": CODE, "max_tokens": 3}),
        ("/v1/chat/completions", CHAT),
        ("/v1/messages", CHAT),
        ("/v1/responses", RESPONSE),
    ],
)
def test_every_api_says_so_and_lets_it_be(shortening: Live, path: str, body: Any) -> None:
    """Answers in their timings, streams in their first event too: who hears only the beginning
    knows. Nothing of it where a request wants the whole prompt."""
    label = answered(shortening, path, body)["timings"]["prefill"]
    assert label["lossy"] is True
    assert label["kept_tokens"] < label["prompt_tokens"] / 3

    def counts(found: Any) -> Any:
        return {name: found[name] for name in ("lossy", "kept_tokens", "prompt_tokens")}

    events = streamed(shortening, path, body)
    first, last = events[0], next(event for event in events[::-1] if "timings" in str(event))
    opening = (first.get("choices") or [first.get("message") or first.get("response") or first])[0]
    assert counts(opening["prefill"]) == counts(label)
    assert counts((last.get("response") or last)["timings"]["prefill"]) == counts(label)
    asked = {**body, "prefill": {"enabled": False}}
    assert "prefill" not in answered(shortening, path, asked)["timings"]
    assert "prefill" not in str(streamed(shortening, path, asked))


def test_each_of_several_prompts_has_its_label(shortening: Live) -> None:
    prompts = {"prompt": ["import re", CODE], "max_tokens": 1}
    choices = answered(shortening, "/v1/completions", prompts)["choices"]
    assert ["prefill" in choice for choice in choices] == [False, True]
    openings = [event for event in streamed(shortening, "/v1/completions", prompts)
                if "prefill" in event["choices"][0]]  # fmt: skip
    assert [event["choices"][0]["index"] for event in openings] == [1]


def test_tokens_are_counted_as_they_are_read(shortening: Live) -> None:
    found = answered(shortening, "/v1/messages/count_tokens", {"messages": CHAT["messages"]})
    assert found["input_tokens"] == found["prefill"]["kept_tokens"]
    answer = answered(shortening, "/v1/messages", CHAT)
    assert (
        sum(answer["usage"][f"{name}input_tokens"] for name in ("", "cache_read_"))
        == (found["input_tokens"])
    )
    assert answer["timings"]["prefill"]["scored_tokens"] == 0, "counting had scored it"


def test_the_server_tells_what_it_does(shortening: Live) -> None:
    """In its log, its counters, its properties, and the slot that is at work."""
    server = shortening
    before = counter(server, "prefill_shortened"), counter(server, "prefill_left_out_tokens")
    kept = answered(server, "/completion", BODY)["timings"]["prefill"]
    whole = answered(server, "/completion", {**BODY, "prefill": {"enabled": False}})
    assert whole["tokens_evaluated"] == kept["prompt_tokens"]
    assert counter(server, "prefill_shortened") == before[0] + 1
    left_out = kept["prompt_tokens"] - kept["kept_tokens"]
    assert counter(server, "prefill_left_out_tokens") == before[1] + left_out
    log = server.said()
    assert "prompts of more than 100 tokens are shortened: 10 % stay" in log
    assert f"prompt shortened: {kept['kept_tokens']} of {kept['prompt_tokens']}" in log
    usual = json.loads(server.get("/props")[1])["prefill"]
    assert (usual["keep"], usual["threshold"]) == (0.1, 100)
    assert "first 2 of its" in usual["scorer"]
    data = json.dumps({**BODY, "n_predict": 1700, "stream": True, "ignore_eos": True}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.url}/completion", data), timeout=60
    ) as answer:
        assert any(b'"origin"' in line for line in answer), "it has a slot by then"
        slots = json.loads(server.get("/slots")[1])
    (slot,) = [slot for slot in slots if slot["is_processing"]]
    assert slot["prefill"]["kept_tokens"] == slot["n_prompt_tokens"] == kept["kept_tokens"]


def test_a_server_without_it_refuses_the_field(server: Live) -> None:
    body = {"prompt": "x", "n_predict": 1}
    refused(server, {**body, "prefill": {"keep": 0.5}}, "without --prefill-drafter")
    assert server.post("/completion", {**body, "prefill": {"enabled": False}})[0] == 200
    assert json.loads(server.get("/props")[1])["prefill"] is None


def refused(server: Live, body: dict[str, Any], message: str) -> None:
    status, found = server.post("/completion", body)
    assert status == 400
    assert message in found["error"]["message"]
    assert found["error"]["param"] == "prefill"
