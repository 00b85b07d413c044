"""Serving: a socket at once, the model when it is there, and an end that drops nobody."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.server.app import App
from orthrus_gguf.server.service import Service

#: Seconds that the head of a request may take to come.
HEAD_SECONDS = 30.0


@dataclass(frozen=True)
class Address:
    """Where to listen. host: of a TCP port, or a path that ends in .sock. certificate, key: files
    for TLS."""

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: str | None = None
    key: str | None = None

    @property
    def url(self) -> str:
        """What to open."""
        if self.host.endswith(".sock"):
            return f"unix:{self.host}"
        scheme = "http" if self.certificate is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"

    def listen(self) -> socket.socket:
        """A socket that listens. Raises OrthrusError, also where TLS could not be offered there."""
        if self.certificate is not None:
            self._check_certificate()
        try:
            if self.host.endswith(".sock"):
                return _unix_socket(Path(self.host))
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            return socket.create_server((self.host, self.port), family=family, backlog=2048)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise OrthrusError(
                f"{self.url}: cannot listen there: {why}; choose another --host or --port"
            ) from error

    def release(self) -> None:
        """Nobody listens there any more."""
        if self.host.endswith(".sock"):
            Path(self.host).unlink(missing_ok=True)

    def _check_certificate(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A key with a password would be asked for on the terminal.
            context.load_cert_chain(str(self.certificate), self.key, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise OrthrusError(
                f"--ssl-cert-file {self.certificate}, --ssl-key-file {self.key}: no certificate and"
                f" its key in PEM, without a password ({error.strerror or error})"
            ) from error


def _unix_socket(path: Path) -> socket.socket:
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as other:
            if other.connect_ex(str(path)) == 0:
                raise OSError(0, "another program listens there")
        path.unlink()
    found = socket.socket(socket.AF_UNIX)
    found.bind(str(path))
    path.chmod(0o600)
    found.listen(2048)
    return found


class _Connection(H11Protocol):
    """One whose head does not come to an end in time is closed: half-open ones cost a file each."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = self.conn.their_state is h11.IDLE  # for the rest of a head
        if waiting and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)
        elif not waiting:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _allow_connections() -> None:
    """As many open files as the system allows: a connection is one, and many systems begin with
    1,024."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Server(uvicorn.Server):
    """The first signal lets answers under way end, the second does not."""

    def __init__(self, config: uvicorn.Config, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._say = say

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            # Answers that are cut off now are no errors to tell of.
            logging.getLogger("uvicorn.error").disabled = True
            return
        self.should_exit = True
        self._say("ending when the answers under way have ended; once more: at once")


def serve(
    app: App,
    address: Address,
    load: Callable[[], Service],
    say: Callable[[str], None],
) -> bool:
    """Serve until a signal comes; returns whether all answers could end.

    load: takes its time, in a thread, while requests hear 503; its errors end the server, and are
    raised from here.
    """
    listening = address.listen()
    _allow_connections()
    with listening:
        config = uvicorn.Config(
            app.asgi,
            log_level="warning",
            ssl_certfile=address.certificate,
            ssl_keyfile=address.key,
            lifespan="off",
            http=_Connection,
            access_log=False,
            server_header=False,
        )
        server = _Server(config, say)
        try:
            asyncio.run(_serve(server, listening, app, load))
        finally:
            address.release()
    service = app.settings.service
    if service is not None:
        service.scheduler.stop(now=server.force_exit)
    return service is not None and not server.force_exit


async def _serve(
    server: _Server, listening: socket.socket, app: App, load: Callable[[], Service]
) -> None:
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Service] = loop.create_future()

    def work() -> None:
        try:
            service = load()
        except Exception as error:
            _call(loop, _settle, loaded, None, error)
        else:
            _call(loop, _settle, loaded, service, None)

    # Not one of asyncio's threads, for which the program would wait in the end.
    threading.Thread(target=work, name="loading", daemon=True).start()
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    both: list[asyncio.Future[Any]] = [loaded, serving]
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not loaded.done():
        loaded.cancel()
    elif loaded.exception() is None:
        app.settings.service = loaded.result()
    else:
        server.should_exit = True
    await serving
    if loaded.done() and not loaded.cancelled():
        loaded.result()


def _settle(
    future: asyncio.Future[Service], service: Service | None, error: Exception | None
) -> None:
    if future.done():
        return
    if service is not None:
        future.set_result(service)
    elif error is not None:
        future.set_exception(error)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """In the event loop, if it is still there."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
