"""A stand-in for the Hugging Face Hub: the routes that a download takes, over one folder of files.

Answers to requests for data can be scripted, so that connections break where a test wants it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """files: path in the repository `repo` → data. script: what the next requests for data get:
    "cut" (half of what was asked for, then the end of the connection), "wrong" (as many other
    bytes), or an HTTP status. requests: of data, path and Range header.
    """

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo = repo
        self.files = files
        self.script: list[str | int] = []
        self.requests: list[tuple[str, str | None]] = []
        self.refusals: dict[str, tuple[int, str]] = {}  # repository → status and error code
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, *, send: bool) -> None:
        path = urlsplit(self.path).path
        is_api = path.startswith("/api/models/")
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo != self.hub.repo:
            status, code = self.hub.refusals.get(repo, (404, "RepoNotFound"))
            self._send(status, b"", {"X-Error-Code": code}, send)
        elif is_api:
            info = {
                "id": repo,
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in self.hub.files],
            }
            body = json.dumps(info).encode()
            self._send(200, body, {"Content-Type": "application/json"}, send)
        else:
            self._file(path.split("/resolve/", 1)[1].split("/", 1)[1], send)

    def _file(self, name: str, send: bool) -> None:
        data = self.hub.files[name]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if not send:
            self._send(200, data, headers, send)
            return
        asked = self.headers.get("Range")
        self.hub.requests.append((name, asked))
        start = 0 if asked is None else int(asked.removeprefix("bytes=").split("-")[0])
        action = self.hub.script.pop(0) if self.hub.script else "all"
        body = data[start:]
        if isinstance(action, int):
            self._send(action, b"", {}, send)
            return
        if action == "wrong":
            body = bytes(len(body))
        if asked is not None:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(200 if asked is None else 206, body, headers, send, cut=action == "cut")

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], send: bool, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serve(hub: HubServer) -> Iterator[HubServer]:
    """Answer requests while entered; `hub.url` says where."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
