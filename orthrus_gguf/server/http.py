"""HTTP: bodies in, JSON and event streams out, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from orthrus_gguf.server.api_errors import ApiError

T = TypeVar("T")

#: Bytes that a body may have: in any case, for each token of the context, and at most.
LEAST_BYTES, BYTES_PER_TOKEN, MOST_BYTES = 1 << 20, 128, 32 << 20

#: Bytes that take a moment to be parsed.
LONG_BYTES = 1 << 18

#: Seconds that a part of a body may take to come.
BODY_SECONDS = 60.0

#: A line that says nothing, so that nobody takes the connection for dead.
PING_LINE = b": ping\n\n"


def dumps(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which a request may spell, becomes U+FFFD."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


class Json(JSONResponse):
    """A JSON answer."""

    def render(self, content: Any) -> bytes:
        return dumps(content)


async def body(request: Request, most: int = LEAST_BYTES) -> Any:
    """The JSON of a request of `most` bytes. Raises ApiError."""
    return await parsed(await raw_body(request, most))


async def raw_body(request: Request, most: int) -> bytearray:
    """A request's body of `most` bytes. Raises ApiError."""
    data, over = bytearray(), 0
    stream = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), BODY_SECONDS)
        except StopAsyncIteration:
            break
        except asyncio.TimeoutError:
            raise ApiError("the body does not come to an end", status=408) from None
        if len(data) + len(chunk) <= most and not over:
            data += chunk
            continue
        # It is read all the same: who is still writing does not hear the answer.
        data.clear()
        over += len(chunk)
        if over > 4 * MOST_BYTES:
            break
    if over:
        raise ApiError(f"the body is larger than {most >> 10} KiB", status=413)
    return data


async def parsed(data: bytearray) -> Any:
    """The JSON of a body. Raises ApiError."""
    return _parsed(data) if len(data) < LONG_BYTES else await in_thread(_parsed, data)


def _parsed(data: bytearray) -> Any:
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is no JSON: {error!s:.200}") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def most_bytes(n_ctx: int) -> int:
    """What a body may have where a conversation has so many tokens: many times the text of them."""
    return min(max(n_ctx * BYTES_PER_TOKEN, LEAST_BYTES), MOST_BYTES)


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    text = data if isinstance(data, bytes) else dumps(data)
    return head + b"data: " + text + b"\n\n"


class EventStream(Response):
    """Server-sent events. When the client goes away, the iterator is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        """on_end: is called when it is over, however it ends."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async with aclosing(self._events) as events:  # type: ignore[type-var]
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await unless_gone(receive, write())
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._on_end()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; if the client goes away before, it is cancelled, and ClientDisconnect is
    raised."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        found: T = tasks[0].result()
        return found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_thread(function: Any, *args: Any, **settings: Any) -> Any:
    """Something that takes a while, beside the event loop."""
    found: Awaitable[Any] = asyncio.to_thread(function, *args, **settings)
    return await found
