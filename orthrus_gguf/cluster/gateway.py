"""The door of a cluster: the HTTP interface of `orthrus-server`, answered by replicas of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from orthrus_gguf.cluster.forwarding import REPLICA, Forwarded
from orthrus_gguf.cluster.prefixes import prefix
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.server import http, metrics, page_files
from orthrus_gguf.server.api_errors import ANTHROPIC_PATHS, ApiError
from orthrus_gguf.server.app import Settings, behind_doors, enabled

#: Replicas that a request is sent to, one after another, where they die before they say anything.
TRIES = 3

#: Seconds after the door's start in which it may not know of replicas that there are.
PATIENCE = 2.0

#: Seconds after which a client may ask again.
RETRY = 2

#: Headers that are for the door only.
SECRET = (b"authorization", b"x-api-key", b"cookie")


class LostError(OrthrusError):
    """The replica that was to answer is no more."""


class Cluster(Protocol):
    """The replicas, as the door sees them."""

    def replicas(self) -> Sequence[str]:
        """Names of those that take requests."""

    def send(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        """What one of them answers; closing it ends the work there. Raises LostError when it dies,
        ApiError (429) where too many requests wait."""

    async def ask_all(self, what: str) -> Mapping[str, Any]:
        """What each of them says to a question that is none of a conversation: `metrics` or
        `slots`. Raises ApiError (503)."""


class Gateway:
    """An ASGI application."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings
        self._patient_until = time.monotonic() + PATIENCE
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/v1/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/slots", self._slots, methods=["GET"]),
            *(page_files.routes() if settings.page else ()),
            Route("/{path:path}", self._forward, methods=["GET", "POST"]),
        ]
        self._doors = behind_doors(routes, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Paths are those below the one that the application is served at."""
        if scope["type"] == "http" and (root := scope.get("root_path")):
            path = scope["path"].removeprefix(root)
            bare = {} if path else {"bare_prefix": root}  # where the page's own addresses fail
            scope = {**scope, "path": path or "/", "root_path": "", **bare}
        await self._doors(scope, receive, send)

    async def _health(self, request: Request) -> Response:
        await self._some_replica()
        return http.Json({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        enabled(self._settings.metrics, "--metrics")
        found = await self._ask_all("metrics")
        page = metrics.exposition(metrics.labelled(found, "replica"))
        return Response(page, media_type=metrics.CONTENT_TYPE)

    async def _slots(self, request: Request) -> Response:
        enabled(self._settings.slots, "--slots")
        found = await self._ask_all("slots")
        return http.Json([{"replica": name, **slot} for name in found for slot in found[name]])

    async def _ask_all(self, what: str) -> Mapping[str, Any]:
        await self._some_replica()
        return await self._cluster.ask_all(what)

    async def _forward(self, request: Request) -> Response:
        scope, body = request.scope, bytearray()
        if request.method == "POST":
            body = await http.raw_body(request, http.MOST_BYTES)
        replica = request.headers.get(REPLICA)
        if scope["path"].startswith("/slots/") and replica is None:
            raise ApiError(f"each replica has its own slots: name one in a header {REPLICA}")
        return _Forwarding(
            self,
            Forwarded(
                request.method,
                scope["path"],
                scope["query_string"],
                tuple(pair for pair in scope["headers"] if pair[0] not in SECRET),
                bytes(body),
                prefix(await http.parsed(body)) if body else (),
                replica,
            ),
        )

    async def answer(self, request: Forwarded, send: Send) -> None:
        """Pass on what a replica answers; another one's, where one dies before it says anything.
        Raises ApiError."""
        sent = _Sent(send)
        for _ in range(TRIES):
            await self._some_replica(request.replica)
            with suppress(LostError):
                async with aclosing(self._cluster.send(request)) as batches:
                    async for batch in batches:
                        for message in batch:
                            await sent.message(message)
            if sent.whole:
                return
            if sent.begun:
                await sent.cut(request.path)
                return
        raise ApiError(
            f"{TRIES} replicas died before they answered; try again",
            status=502,
            retry_after=RETRY,
        )

    async def _some_replica(self, name: str | None = None) -> None:
        """Raises ApiError where there is none, or not that one."""
        while not (replicas := self._cluster.replicas()) and time.monotonic() < self._patient_until:
            await asyncio.sleep(0.02)
        if not replicas:
            raise ApiError("Loading model", status=503, retry_after=RETRY)
        if name is not None and name not in replicas:
            known = ", ".join(replicas)
            raise ApiError(f"{REPLICA}: there is no {name}, only {known}", status=404)


@dataclass
class _Sent:
    """What a client has been told. The head waits for the first of the body: as long as that has
    not come, another replica may answer. whole: all of it. begun: some of it."""

    send: Send
    head: Message | None = None
    whole: bool = False
    begun: bool = False

    async def message(self, message: Message) -> None:
        """Pass it on."""
        if message["type"] == "http.response.start":
            self.head = message
            return
        if not self.begun and self.head is not None:
            self.begun = True
            await self.send(self.head)
        self.whole = not message.get("more_body", False)
        await self.send(message)

    async def cut(self, path: str) -> None:
        """End an answer that cannot go on: event streams say so, others just break off."""
        assert self.head is not None
        if (b"content-type", b"text/event-stream") not in _types(self.head):
            raise LostError("the replica died in the middle of an answer")
        error = ApiError("the replica that answered died; ask again", status=502)
        name = "error" if path.startswith(ANTHROPIC_PATHS) else None
        data = http.event(error.body(path), name)
        await self.send({"type": "http.response.body", "body": data})


def _types(head: Message) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value.split(b";")[0]) for name, value in head["headers"]]


class _Forwarding(Response):
    """The answer of a replica. When the client goes away, the replica hears of it."""

    def __init__(self, gateway: Gateway, request: Forwarded) -> None:
        super().__init__()
        self._gateway, self._request = gateway, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect, OSError):
            await http.unless_gone(receive, self._gateway.answer(self._request, send))
