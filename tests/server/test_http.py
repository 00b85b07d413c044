"""What clients that are slow, silent or far too eager meet."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from live_server import Live
from starlette.requests import Request

from orthrus_gguf.server import http, serve
from orthrus_gguf.server.api_errors import ApiError
from orthrus_gguf.server.service import Service


def test_a_head_that_does_not_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an answer that takes longer than a head may is not."""
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.15)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.4)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def ask(port: int, *parts: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.6 if len(parts) > 1 else 0)
        found = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return found

    async def run() -> list[bytes]:
        with serve.Address(port=0).listen() as listening:
            settings: Any = {"lifespan": "off", "log_level": "error", "http": serve._Connection}
            settings["timeout_keep_alive"] = 60
            server = uvicorn.Server(uvicorn.Config(app, **settings))
            serving = asyncio.ensure_future(server.serve(sockets=[listening]))
            port = listening.getsockname()[1]
            whole = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            begun = (whole.replace(b"Connection: close\r\n", b""), b"GET")
            sent: tuple[tuple[bytes, ...], ...] = ((b"",), (b"GET",), (whole,), begun)
            found = await asyncio.gather(*(ask(port, *parts) for parts in sent))
            server.should_exit = True
            await serving
            return found

    nothing, part, whole, begun = asyncio.run(run())
    assert nothing == part == b""
    assert b"done" in whole
    assert begun.count(b"done") == 1  # the second head never came to an end


def test_a_body_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", 0.05)

    async def receive() -> Any:
        if not sent:
            sent.append(1)
            return {"type": "http.request", "body": b"{", "more_body": True}
        await asyncio.sleep(60)

    sent: list[int] = []
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(ApiError) as caught:
        asyncio.run(http.body(request))
    assert caught.value.status == 408


def test_a_body_that_is_too_large_is_told_of(server: Live) -> None:
    """Also to a client that is still writing it when that is clear."""
    assert http.most_bytes(1024) == http.LEAST_BYTES
    status, found = server.post("/completion", b'{"prompt": "' + b"a" * (20 << 20) + b'"}')
    assert status == 413
    assert found["error"]["message"] == "the body is larger than 1024 KiB"


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_a_text_that_is_far_too_long_is_not_read_to_its_end(server: Live, path: str) -> None:
    text = "import os\n" * 90_000
    body: dict[str, Any] = {"prompt": text, "n_predict": 1, "max_tokens": 1}
    if "chat" in path:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    status, found = server.post(path, body)
    assert (status, found["error"]["type"]) == (400, "exceed_context_size_error")
    assert 1024 < found["error"]["n_prompt_tokens"] < 16 * 1024


def test_a_long_text_of_few_tokens_is_read() -> None:
    """What decides is tokens, not characters."""

    class Runs:
        def encode(self, text: str, *, guarded: bool) -> list[int]:
            return [7] * (len(text) // 50)

    stub: Any = SimpleNamespace(n_ctx=4, tokenizer=Runs())
    assert Service.encoded(stub, " " * 150, "prompt") == [7, 7, 7]
