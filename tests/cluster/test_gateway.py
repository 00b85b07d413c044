"""The door of a cluster, before replicas that live in this process and die on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from prometheus_client.core import CounterMetricFamily
from starlette.types import Message, Receive, Scope, Send

from orthrus_gguf.cluster import gateway
from orthrus_gguf.cluster.forwarding import REPLICA, Forwarded, answered
from orthrus_gguf.cluster.gateway import TRIES, Gateway, LostError
from orthrus_gguf.server.api_errors import ApiError
from orthrus_gguf.server.app import Settings

App = Callable[[Scope, Receive, Send], Awaitable[None]]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def says(*parts: bytes, headers: Any = (), die_at: int | None = None) -> App:
    """An application that answers in parts, or whose replica dies before one of them."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
        for number, part in enumerate(parts):
            if number == die_at:
                raise LostError("dead")
            more = number < len(parts) - 1
            await send({"type": "http.response.body", "body": part, "more_body": more})

    return app


class Replicas:
    """A cluster: requests go to the first that is alive."""

    def __init__(self, **apps: App) -> None:
        self.apps, self.asked, self.closed = apps, list[tuple[str, Forwarded]](), 0
        self.busy = False

    def replicas(self) -> tuple[str, ...]:
        return tuple(self.apps)

    async def send(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        if self.busy:
            raise ApiError("too many", status=429, retry_after=2)
        name = request.replica or next(iter(self.apps))
        self.asked.append((name, request))
        dead: list[BaseException] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await self.apps[name](scope, receive, send)
            except LostError as error:
                dead.append(error)

        try:
            async with aclosing(answered(app, request, name)) as batches:
                async for batch in batches:
                    yield batch
            if dead:
                del self.apps[name]
                raise dead[0]
        finally:
            self.closed += 1

    async def ask_all(self, what: str) -> Mapping[str, Any]:
        if what == "slots":
            return {name: [{"id": 0}] for name in self.apps}
        return {name: [CounterMetricFamily("n", "words", value=1)] for name in self.apps}


def call(
    cluster: Replicas, method: str, path: str, settings: Settings | None = None, **given: Any
) -> httpx.Response:
    app: Any = Gateway(cluster, settings or Settings(metrics=True))
    transport = httpx.ASGITransport(
        app, raise_app_exceptions=False, root_path=given.pop("root", "")
    )

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **given)

    return asyncio.run(run())


def test_requests_and_answers_pass_unchanged() -> None:
    cluster = Replicas(a=says(b"one", b"two", headers=[(b"x-other", b"1")]))
    body = {"messages": [{"role": "user", "content": "hi"}]}
    found = call(cluster, "POST", "/v1/chat/completions?x=1", json=body, headers={"x-given": "2"})
    assert (found.status_code, found.content) == (200, b"onetwo")
    assert found.headers["x-other"] == "1"
    assert found.headers[REPLICA] == "a"
    ((_, request),) = cluster.asked
    assert (request.method, request.path, request.query) == ("POST", "/v1/chat/completions", b"x=1")
    assert json.loads(request.body) == body
    assert (b"x-given", b"2") in request.headers
    assert request.prefix


def test_keys_are_asked_for_at_the_door_and_stay_there() -> None:
    cluster, settings = Replicas(a=says(b"{}")), Settings(keys=["secret"], prefix="/api")
    denied = call(cluster, "POST", "/api/v1/messages", settings, json={})
    assert denied.status_code == 401
    assert denied.json()["type"] == "error"
    assert not cluster.asked
    key = {"authorization": "Bearer secret", "x-api-key": "secret"}
    assert call(cluster, "POST", "/api/v1/messages", settings, json={}, headers=key).is_success
    ((_, request),) = cluster.asked
    assert b"secret" not in b"".join(value for _, value in request.headers)
    assert request.path == "/v1/messages"
    assert call(cluster, "GET", "/api/health", settings).is_success


def test_below_a_path_of_ray_serve() -> None:
    cluster = Replicas(a=says(b"{}"))
    assert call(cluster, "GET", "/llm/v1/models", root="/llm").is_success
    assert cluster.asked[0][1].path == "/v1/models"


def test_the_page_is_the_doors_own() -> None:
    """Also while models are loaded, and below a path of Ray Serve, where its addresses are
    relative."""
    page = call(Replicas(), "GET", "/", Settings(keys=["secret"], page=True))
    assert page.is_success
    assert "content-security-policy" in page.headers
    bare = call(Replicas(), "GET", "/llm", Settings(page=True), root="/llm")
    assert (bare.status_code, bare.headers["location"]) == (308, "/llm/")
    assert call(Replicas(), "GET", "/llm/", Settings(page=True), root="/llm").is_success
    cluster = Replicas(a=says(b"{}"))
    call(cluster, "GET", "/", Settings(page=False))
    assert cluster.asked


def test_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "PATIENCE", 0.0)
    for method, path in (("GET", "/health"), ("POST", "/v1/messages"), ("GET", "/metrics")):
        found = call(Replicas(), method, path)
        assert found.status_code == 503
        assert found.json()["error"]["message"] == "Loading model"
        assert found.headers["retry-after"] == "2"


def test_a_door_that_has_just_opened_waits_for_replicas() -> None:
    cluster = Replicas()

    async def run() -> int:
        app: Any = Gateway(cluster, Settings())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            request = asyncio.ensure_future(client.get("/health"))
            await asyncio.sleep(0.05)
            assert not request.done()
            cluster.apps["a"] = says(b"{}")
            return (await request).status_code

    assert asyncio.run(run()) == 200


@pytest.mark.parametrize("die_at", [0, None])
def test_another_replica_answers_where_nothing_was_said_yet(die_at: int | None) -> None:
    cluster = Replicas(a=says(b"{}", die_at=die_at), b=says(b"{}"))
    found = call(cluster, "POST", "/completion", json={"prompt": "x"})
    assert found.is_success
    assert [name for name, _ in cluster.asked] == (["a", "b"] if die_at == 0 else ["a"])
    assert found.headers[REPLICA] == cluster.asked[-1][0]


def test_not_for_ever() -> None:
    dying = {name: says(b"{}", die_at=0) for name in "abcd"}
    cluster = Replicas(**dying)
    found = call(cluster, "POST", "/completion", json={"prompt": "x"})
    assert found.status_code == 502
    assert "died before they answered" in found.json()["error"]["message"]
    assert len(cluster.asked) == TRIES


@pytest.mark.parametrize(
    ("path", "start"),
    [("/v1/chat/completions", b'data: {"error"'), ("/v1/messages", b"event: error\ndata: {")],
)
def test_a_stream_that_breaks_off_says_so(path: str, start: bytes) -> None:
    events = [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"]
    cluster = Replicas(a=says(*events, headers=STREAM, die_at=2), b=says(b"data: other\n\n"))
    found = call(cluster, "POST", path, json={"messages": []})
    assert found.content.startswith(b"data: 1\n\ndata: 2\n\n" + start)
    assert b"the replica that answered died; ask again" in found.content
    assert [name for name, _ in cluster.asked] == ["a"]


def test_what_is_no_stream_breaks_off() -> None:
    cluster = Replicas(a=says(b"1", b"2", die_at=1), b=says(b"other"))

    async def run() -> list[Message]:
        heard: list[Message] = []

        async def hear(message: Message) -> None:
            heard.append(message)

        app = Gateway(cluster, Settings())
        with pytest.raises(LostError, match="in the middle"):
            await app.answer(Forwarded("GET", "/props"), hear)
        return heard

    assert [message.get("body") for message in asyncio.run(run())] == [None, b"1"]


def test_a_client_that_goes_away_ends_the_work() -> None:
    """In the replica, too, where only the end of the iterator tells of it."""
    ended = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        try:
            while True:
                await send({"type": "http.response.body", "body": b": \n\n", "more_body": True})
                await asyncio.sleep(0.01)
        finally:
            ended.append(True)

    async def run() -> int:
        body = b'{"prompt": "x"}'
        incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        count = 0

        async def receive() -> Message:
            while not incoming and count < 5:
                await asyncio.sleep(0.01)
            return incoming.pop() if incoming else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal count
            count += 1

        headers: list[Any] = []
        scope = {"type": "http", "method": "POST", "path": "/completion", "headers": headers}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http"}
        app = Gateway(cluster, Settings())
        await asyncio.wait_for(app(scope, receive, send), 10)
        return count

    cluster = Replicas(a=endless)
    assert asyncio.run(run()) >= 5
    assert ended == [True]
    assert cluster.closed == 1


def test_an_iterator_that_is_left_ends_the_work() -> None:
    """Ray cancels who iterates, and keeps the iterator."""
    ended = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def run() -> None:
        batches = answered(endless, Forwarded("GET", "/"), "a")

        async def iterate() -> None:
            async for _ in batches:
                await asyncio.sleep(60)

        task = asyncio.ensure_future(iterate())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        assert ended == [True]
        await batches.aclose()

    asyncio.run(run())


def test_a_replica_may_be_named() -> None:
    cluster = Replicas(a=says(b"{}"), b=says(b"{}"))
    named = call(cluster, "POST", "/slots/0?action=erase", headers={REPLICA: "b"})
    assert named.headers[REPLICA] == "b"
    unknown = call(cluster, "GET", "/props", headers={REPLICA: "c"})
    assert unknown.status_code == 404
    assert "only a, b" in unknown.json()["error"]["message"]
    nameless = call(cluster, "POST", "/slots/0?action=erase")
    assert nameless.status_code == 400
    assert REPLICA in nameless.json()["error"]["message"]


def test_counters_and_slots_of_all() -> None:
    cluster = Replicas(a=says(), b=says())
    page = call(cluster, "GET", "/metrics").text
    assert [line for line in page.splitlines() if not line.startswith("#")] == [
        'n_total{replica="a"} 1.0',
        'n_total{replica="b"} 1.0',
    ]
    assert page.count("# TYPE") == 1
    slots = call(cluster, "GET", "/slots").json()
    assert slots == [{"replica": "a", "id": 0}, {"replica": "b", "id": 0}]
    closed = Settings(metrics=False, slots=False)
    assert call(cluster, "GET", "/metrics", closed).status_code == 501
    assert call(cluster, "GET", "/slots", closed).status_code == 501


def test_errors_at_the_door() -> None:
    cluster = Replicas(a=says(b"{}"))
    assert call(cluster, "POST", "/completion", content=b"{").status_code == 400
    assert call(cluster, "DELETE", "/completion").status_code == 405
    assert not cluster.asked
    cluster.busy = True
    busy = call(cluster, "POST", "/completion", json={})
    assert busy.status_code == 429
    assert busy.headers["retry-after"] == "2"


def test_a_bug_in_a_replica_ends_its_answer(capfd: pytest.CaptureFixture[str]) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        raise ValueError("a bug")

    found = call(Replicas(a=broken), "POST", "/completion", json={})
    assert b"error" in found.content
    assert "ValueError: a bug" in capfd.readouterr().err
