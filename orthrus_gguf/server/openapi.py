"""The description of the HTTP interface, generated from the endpoints and their bodies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from orthrus_gguf import __version__
from orthrus_gguf.server.fields import schema


class Described(Protocol):
    """What an endpoint says of itself (see `app.Endpoint`)."""

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def body(self) -> type: ...
    @property
    def summary(self) -> str: ...


GETS = {
    "/health": "Whether the model is there",
    "/v1/health": "Whether the model is there",
    "/models": "The model",
    "/v1/models": "The model",
    "/props": "What runs here",
    "/slots": "What the slots do",
    "/metrics": "Counters for Prometheus",
    "/openapi.json": "This description",
}

_ERROR = {
    "description": "an error; param names the field",
    "content": {"application/json": {"schema": {"type": "object"}}},
}


def description(endpoints: Sequence[Described], *, public: Collection[str]) -> dict[str, Any]:
    """OpenAPI 3.1. public: paths that need no key."""
    known: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        body = {"application/json": {"schema": schema(endpoint.body, known)}}
        for path in endpoint.paths:
            operation = {
                "summary": endpoint.summary,
                "requestBody": {"required": True, "content": body},
                "responses": {
                    "200": {
                        "description": "the answer; events where stream is true",
                        "content": {"application/json": {}, "text/event-stream": {}},
                    },
                    **dict.fromkeys(("400", "401", "408", "413", "429", "503"), _ERROR),
                },
            }
            paths[path] = {"post": operation}
    for path, summary in GETS.items():
        get: dict[str, Any] = {
            "summary": summary,
            "responses": {
                "200": {"description": "the answer"},
                **dict.fromkeys(("401", "501", "503"), _ERROR),
            },
        }
        if path in public:
            get["security"] = []
        paths[path] = {"get": get}
    action = {"enum": ["save", "restore", "erase"]}
    paths["/slots/{id}"] = {
        "post": {
            "summary": "Save, restore or erase a slot",
            "parameters": [
                {
                    "name": "id",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 0},
                },
                {"name": "action", "in": "query", "required": True, "schema": action},
            ],
            "requestBody": {
                "content": {
                    "application/json": {
                        "schema": {
                            "type": "object",
                            "properties": {"filename": {"type": "string"}},
                        }
                    }
                }
            },
            "responses": {
                "200": {"description": "how many tokens"},
                **dict.fromkeys(("400", "401", "404", "501", "503"), _ERROR),
            },
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "orthrus-server", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": known,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
