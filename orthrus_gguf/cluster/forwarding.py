"""A request that is answered in another process than the one that it came to."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

from orthrus_gguf.cluster.prefixes import Prefix

#: Names the replica that answered; in a request: the one that shall.
REPLICA = "x-orthrus-replica"


@dataclass(frozen=True)
class Forwarded:
    """A whole HTTP request. prefix: what its prompt begins with. replica: that shall answer; None:
    any."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    prefix: Prefix = ()
    replica: str | None = None


async def answered(
    app: ASGIApp, request: Forwarded, name: str
) -> AsyncGenerator[list[Message], None]:
    """What an ASGI application sends, as it comes, several messages at once where they wait.
    name: of this replica, which the answer's headers tell. Closing the iterator ends the work, and
    so does the end of the task that iterates."""
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    given: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if given:
            return given.pop()
        # Nobody goes away without the iterator being closed.
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (REPLICA.encode(), name.encode())]
            message = {**message, "headers": headers}
        queue.put_nowait(message)

    work = asyncio.ensure_future(_run(app, _scope(request), receive, send))
    work.add_done_callback(lambda _: queue.put_nowait(None))
    # Ray cancels the task that iterates. Where that waits for something else at the moment, nobody
    # closes the iterator.
    iterating = asyncio.current_task()
    assert iterating is not None
    iterating.add_done_callback(lambda _: work.cancel())
    try:
        over = False
        while not over:
            batch = [await queue.get()]
            while not queue.empty():
                batch.append(queue.get_nowait())
            over = batch[-1] is None
            if messages := [message for message in batch if message is not None]:
                yield messages
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def _run(app: ASGIApp, *call: object) -> None:
    """Bugs show where they are; who asked has been told that there is one."""
    try:
        await app(*call)  # type: ignore[arg-type]
    except Exception as error:
        traceback.print_exception(error)


def _scope(request: Forwarded) -> Message:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": None,
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": None,
        "server": None,
    }
