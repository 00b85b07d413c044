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
from typing import Any

from live_server import Live

PROMPTS = ("import ", "def read(self):\n" * 9, "class A:\n")
PLANS = ("ar", "fused", "two-pass@5+tree=9", "auto")


def request(index: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": PROMPTS[index % 3],
        "n_predict": 20 + index,
        "seed": index,
        "speculative": {"strategy": PLANS[index % 4]},
        "cache_prompt": index % 7 != 0,
        "n_probs": 2 * (index % 6 == 0),
    }
    if index % 5 == 4:
        body["regex"] = "[a-z ]{30}"
    return body


def ask(server: Live, index: int) -> tuple[Any, Any, Any]:
    status, found = server.post("/completion", request(index))
    assert status == 200, found
    return found["content"], found["tokens"], found.get("completion_probabilities")


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


def test_every_answer_is_what_it_is_alone(server: Live) -> None:
    alone = [ask(server, index) for index in range(16)]
    order = [*range(16)] * 2
    random.Random(2).shuffle(order)
    counts = [0]
    with leaving(server, counts), ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda index: ask(server, index), order))
    assert counts[0] > 20
    for index, answer in zip(order, found, strict=True):
        assert answer == alone[index]
    # Nobody is served any more, and nothing went wrong on the way.
    deadline = time.monotonic() + 20
    while any(slot["is_processing"] for slot in json.loads(server.get("/slots")[1])):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "Traceback" not in server.said()
