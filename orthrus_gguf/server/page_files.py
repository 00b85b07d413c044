"""The page: a chat for browsers, from files of this package. Nothing of it comes from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

#: Scripts, styles and pictures come from here, and requests go here; markup is never made of texts.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def _read() -> dict[str, tuple[bytes, str]]:
    """Path -> what is there, and its type."""
    found = {}
    for file in files("orthrus_gguf.server").joinpath("page").iterdir():
        kind = file.name.rpartition(".")[2]
        if kind in TYPES:
            path = "/" if file.name == "index.html" else f"/assets/{file.name}"
            found[path] = (file.read_bytes(), TYPES[kind])
    return found


FILES = _read()


def routes() -> list[Route]:
    """Of all files: there is nothing else that a path could reach."""
    return [Route(path, _answer, methods=["GET"]) for path in FILES]


async def _answer(request: Request) -> Response:
    path = request.scope["path"]
    if path == "/" and request.scope.get("bare_prefix"):
        # The page's own addresses are relative.
        return RedirectResponse(f"{request.scope['bare_prefix']}/", status_code=308)
    content, kind = FILES[path]
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag, "Content-Type": kind}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)
