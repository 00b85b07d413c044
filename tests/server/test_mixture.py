"""Requests of all kinds at once, with clients that leave: each answer is what it is alone."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, live

PROMPTS = ("import ", "def read(self):\n" * 9, "class A:\n", "import os\n" * 40 + "def f(")
PLANS = ("ar", "fused", "two-pass@5+tree=9", "auto", "ar+lookup", "fused@4x2+lookup+tail")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "size": {"enum": [1, 20, 300]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"regex": "[a-z ]{30}"},
    {"json_schema": SCHEMA},
    {"grammar": 'root ::= ("import " [a-z]+ "\\n")+'},
)
TOOL = {"type": "function", "function": {"name": "open_file", "parameters": SCHEMA}}


def request(index: int) -> tuple[str, dict[str, Any]]:
    """Where to, and the body: of a kind of its own for each index."""
    chance = random.Random(index)
    body: dict[str, Any] = {
        "prompt": chance.choice(PROMPTS)[chance.choice([0, 0, 3]) :],
        "n_predict": chance.randint(1, 48),
        "seed": index,
        "temperature": chance.choice([0, 0.7, 1.2]),
        "repeat_penalty": chance.choice([1, 1, 1.2]),
        "cache_prompt": chance.random() < 0.8,
        "speculative": {"strategy": PLANS[index % len(PLANS)]},
    }
    if index % 9 == 8:
        message = {"role": "user", "content": body.pop("prompt")}
        more = {"tools": [TOOL], "tool_choice": "required", "enable_thinking": False}
        limit = {"max_tokens": body.pop("n_predict")}
        return "/v1/chat/completions", {**body, **more, **limit, "messages": [message]}
    if index % 5 == 4:
        body.update(chance.choice(GRAMMARS))
    if index % 4 == 0:
        body["n_probs"] = 2
    if index % 7 == 3:
        body["stop"] = ["self", "\n\n"]
    return "/completion", body


def ask(server: Live, index: int, **changes: Any) -> Any:
    """What a client is told that depends on the request alone."""
    path, body = request(index)
    status, found = server.post(path, {**body, **changes})
    assert status == 200, found
    if "choices" in found:
        (choice,) = found["choices"]
        calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
        return choice["message"]["content"], calls, choice["finish_reason"]
    told = ("content", "tokens", "stop_type", "stopping_word", "completion_probabilities")
    return tuple(found.get(name) for name in told)


@contextmanager
def leaving(server: Live, counts: list[int]) -> Iterator[None]:
    """Clients that send a request, or part of one, and leave soon."""
    over, chance = threading.Event(), random.Random(1)

    def leave() -> None:
        while not over.is_set():
            body = json.dumps(
                {
                    "prompt": "import os\n" * chance.randint(1, 60),
                    "n_predict": 300,
                    "stream": chance.random() < 0.5,
                    "ignore_eos": True,
                }
            ).encode()
            head = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(head + body[: chance.choice([len(body), len(body), 10])])
                time.sleep(chance.random() * 0.04)
            counts[0] += 1

    thread = threading.Thread(target=leave)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def check(server: Live, alone: list[Any], order: list[int], at_once: int) -> None:
    """Requests in this order, so many at once, beside clients that leave."""
    counts = [0]
    with leaving(server, counts), ThreadPoolExecutor(at_once) as threads:
        found = list(threads.map(lambda index: ask(server, index), order))
    assert counts[0] > len(order) // 2
    for index, answer in zip(order, found, strict=True):
        assert answer == alone[index], request(index)
    # Nobody is served any more, and nothing went wrong on the way.
    deadline = time.monotonic() + 20
    while any(slot["is_processing"] for slot in json.loads(server.get("/slots")[1])):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "Traceback" not in server.said()


def test_every_answer_is_what_it_is_alone(server: Live) -> None:
    plain = {"speculative": {"enabled": False}, "cache_prompt": False}
    alone = [ask(server, index, **plain) for index in range(18)]
    order = [*range(18)] * 2
    random.Random(2).shuffle(order)
    check(server, alone, order, 8)


@pytest.fixture(scope="module")
def answers(chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of 200 requests gives on a server that serves nobody else and never drafts."""
    with live(
        chat_file, tmp_path_factory.mktemp("alone"), "-np", 1, "-c", 1024, "--strategy", "ar"
    ) as server:
        plain = {"speculative": {"enabled": False}, "cache_prompt": False}
        return [ask(server, index, **plain) for index in range(200)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2, 3, 5, 8])
def test_200_requests(chat_file: Path, tmp_path: Path, answers: list[Any], parallel: int) -> None:
    order = [*range(200)]
    random.Random(parallel).shuffle(order)
    with live(chat_file, tmp_path, "-np", parallel, "-c", 1024) as server:
        check(server, answers, order, parallel + 3)
