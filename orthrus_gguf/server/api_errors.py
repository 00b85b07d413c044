"""What clients are told when something is wrong, in the shapes of the APIs that they speak."""

from __future__ import annotations

from typing import Any

#: HTTP status → type, as OpenAI and Anthropic call them.
OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

#: What paths of Anthropic's API begin with.
ANTHROPIC_PATHS = "/v1/messages"


class ApiError(Exception):
    """An answer that is an error. param: the field that is wrong. more: further fields."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        kind: str | None = None,
        retry_after: int | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param = message, status, param
        self.kind, self.retry_after, self.more = kind, retry_after, more

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's shape, which llama-server's own endpoints share."""
        kind = self.kind or OPENAI_TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return {"error": {**error, **self.more}}

    def anthropic(self) -> dict[str, Any]:
        """The body in Anthropic's shape."""
        kind = ANTHROPIC_TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def body(self, path: str) -> dict[str, Any]:
        """The body in the shape of the API that a path belongs to."""
        return self.anthropic() if path.startswith(ANTHROPIC_PATHS) else self.openai()


def wrong(param: str, problem: str) -> ApiError:
    """A field that is not as it should be."""
    return ApiError(f"{param}: {problem}", param=param)
