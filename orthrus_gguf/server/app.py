"""The application: paths, and what every request goes through."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from orthrus_gguf.server import (
    anthropic,
    http,
    metrics,
    native,
    openai,
    openapi,
    page_files,
    responses,
)
from orthrus_gguf.server.answers import Stream, cancel
from orthrus_gguf.server.api_errors import ApiError, wrong
from orthrus_gguf.server.chat_requests import ChatRequest
from orthrus_gguf.server.fields import read
from orthrus_gguf.server.keys import PUBLIC, Keys
from orthrus_gguf.server.service import Service
from orthrus_gguf.server.slot_files import SlotFiles, erase

Handler = Callable[[Service, Any], Awaitable[dict[str, Any] | Stream]]


@dataclass
class Settings:
    """Of the application. cors: origins of pages that may use it, `*` for all. service: None while
    the model is being loaded. slot_files: None where slots cannot be saved."""

    keys: Sequence[str] = ()
    cors: Sequence[str] = ()
    prefix: str = ""
    metrics: bool = False
    props: bool = True
    slots: bool = True
    page: bool = True
    service: Service | None = None
    slot_files: SlotFiles | None = None


@dataclass(frozen=True)
class Endpoint:
    """A path that takes a JSON body. body: its dataclass."""

    paths: tuple[str, ...]
    body: type
    handler: Handler
    summary: str


ENDPOINTS = (
    Endpoint(
        ("/v1/chat/completions", "/chat/completions"),
        ChatRequest,
        openai.chat,
        "An answer to a conversation (OpenAI)",
    ),
    Endpoint(
        ("/v1/completions",),
        openai.CompletionRequest,
        openai.completion,
        "A prompt gone on with (OpenAI)",
    ),
    Endpoint(
        ("/v1/responses", "/responses"),
        responses.ResponsesRequest,
        responses.respond,
        "An answer (OpenAI's Responses)",
    ),
    Endpoint(
        ("/v1/messages",),
        anthropic.MessagesRequest,
        anthropic.messages,
        "An answer to a conversation (Anthropic)",
    ),
    Endpoint(
        ("/v1/messages/count_tokens",),
        anthropic.CountRequest,
        anthropic.count_tokens,
        "Tokens of a conversation (Anthropic)",
    ),
    Endpoint(
        ("/completion", "/completions"),
        native.NativeRequest,
        native.completion,
        "A prompt gone on with (llama-server)",
    ),
    Endpoint(("/tokenize",), native.TokenizeRequest, native.tokenize, "Text to ids"),
    Endpoint(("/detokenize",), native.DetokenizeRequest, native.detokenize, "Ids to text"),
    Endpoint(
        ("/apply-template",),
        native.TemplateRequest,
        native.apply_template,
        "The prompt that a conversation becomes",
    ),
)


@dataclass
class App:
    """Handlers of requests. `asgi` is what a server runs."""

    settings: Settings
    asgi: ASGIApp = field(init=False)

    def __post_init__(self) -> None:
        routes = [
            Route(path, self._post(endpoint), methods=["POST"])
            for endpoint in ENDPOINTS
            for path in endpoint.paths
        ]
        for path, handler in {
            "/health": self._health,
            "/v1/health": self._health,
            "/models": self._models,
            "/v1/models": self._models,
            "/props": self._props,
            "/slots": self._slots,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
        }.items():
            routes.append(Route(path, handler, methods=["GET"]))
        routes.append(Route("/slots/{id:int}", self._slot, methods=["POST"]))
        if self.settings.page:
            routes += page_files.routes()
        self.asgi = behind_doors(routes, self.settings)

    def _service(self) -> Service:
        """Raises ApiError (503) while there is none."""
        if self.settings.service is None:
            raise ApiError("Loading model", status=503, retry_after=2)
        return self.settings.service

    def _post(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            service = self._service()
            body = await http.body(request, http.most_bytes(service.n_ctx))
            given: Any = read(endpoint.body, body)
            work = asyncio.ensure_future(endpoint.handler(service, given))
            found = await http.unless_gone(request.receive, _awaited(work))
            if isinstance(found, Stream):
                answers = found.answers
                return http.EventStream(found.events, lambda: cancel(answers))
            return http.Json(found)

        return handle

    async def _health(self, request: Request) -> Response:
        self._service()
        return http.Json({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return http.Json(openai.models(self._service()))

    async def _props(self, request: Request) -> Response:
        enabled(self.settings.props, "--props")
        return http.Json(native.props(self._service()))

    async def _slots(self, request: Request) -> Response:
        enabled(self.settings.slots, "--slots")
        return http.Json(native.slots(self._service()))

    async def _metrics(self, request: Request) -> Response:
        enabled(self.settings.metrics, "--metrics")
        page = metrics.exposition(metrics.families(self._service().scheduler))
        return Response(page, media_type=metrics.CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return http.Json(openapi.description(ENDPOINTS, public=PUBLIC))

    async def _slot(self, request: Request) -> Response:
        """Save, restore or erase a slot."""
        service, files = self._service(), self.settings.slot_files
        action = request.query_params.get("action")
        if action not in ("save", "restore", "erase"):
            raise wrong("action", "expected save, restore or erase")
        slots, id = service.scheduler.pool.slots, request.path_params["id"]
        if id >= len(slots):
            raise ApiError(f"there is no slot {id}, only 0..{len(slots) - 1}", status=404)
        slot = slots[id]
        if action == "erase":
            count = await asyncio.wrap_future(service.scheduler.call(lambda: erase(slot)))
            return http.Json({"id_slot": id, "n_erased": count})
        if files is None:
            raise ApiError("slots cannot be saved: start with --slot-save-path", status=501)
        given = await http.body(request)
        name = given.get("filename") if isinstance(given, dict) else None
        if not isinstance(name, str):
            raise wrong("filename", "expected a text")
        path = files.path(name)
        work = files.save if action == "save" else files.restore
        count = await asyncio.wrap_future(service.scheduler.call(lambda: work(slot, path)))
        told = {"id_slot": id, "filename": name, f"n_{action}d": count}
        return http.Json(told)


def enabled(given: bool, flag: str) -> None:
    """Raises ApiError where an endpoint is not."""
    if not given:
        raise ApiError(f"not enabled: start the server with {flag}", status=501)


def behind_doors(routes: Sequence[Route], settings: Settings) -> ASGIApp:
    """An application that only those with a key come into, from where they may; its errors are told
    in the shape of the API that they happen in."""
    middleware = [
        Middleware(_Doors, keys=Keys(settings.keys), prefix=settings.prefix.rstrip("/")),
    ]
    if settings.cors:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _nobody_there,
            Exception: _bug,
        },
    )


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


class _Doors:
    """Keys and the path's prefix, before anything else."""

    def __init__(self, app: ASGIApp, keys: Keys, prefix: str) -> None:
        self._app, self._keys, self._prefix = app, keys, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if self._prefix:
            if not f"{path}/".startswith(f"{self._prefix}/"):
                error = ApiError("there is no such path", status=404)
                await _error(error, path)(scope, receive, send)
                return
            bare = self._prefix if path == self._prefix else None
            path = path.removeprefix(self._prefix) or "/"
            scope = {**scope, "path": path, "raw_path": None, "bare_prefix": bare}
        if not self._keys.fit(path, Request(scope).headers):
            error = ApiError("the API key is missing or wrong", status=401)
            await _error(error, path)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _error(error: ApiError, path: str) -> Response:
    wait = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return http.Json(error.body(path), status_code=error.status, headers=wait)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error, request.scope["path"])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(str(error.detail), status=error.status_code)
    return _error(told, request.scope["path"])


async def _bug(request: Request, error: Exception) -> Response:
    """The log has its traceback."""
    told = ApiError("internal error: the server's log tells more", status=500)
    return _error(told, request.scope["path"])


async def _nobody_there(request: Request, error: Exception) -> Response:
    return PlainTextResponse("", status_code=499)
