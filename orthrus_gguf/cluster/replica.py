"""A replica: one `orthrus-server` without a socket of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from ray import serve
from starlette.types import Message

from orthrus_gguf.cli import options, server
from orthrus_gguf.cluster.affinity import Held, marks
from orthrus_gguf.cluster.forwarding import Forwarded, answered
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.server import metrics, native
from orthrus_gguf.server.app import App

#: Places of prompts that a replica tells of, so that a door that was started anew knows them.
TOLD = 2048


class Replica:
    """Loads a model when it is made, which takes a while."""

    def __init__(self, flags: Sequence[str]) -> None:
        """flags: of `orthrus-server`, without those for the door."""
        args = server.parser().parse_args(flags)
        self._name = str(serve.get_replica_context().replica_id.unique_id)
        self._held, self._resources = Held(), ExitStack()
        settings = server.make_settings(args)
        path = options.model_path(args)
        self._service = server.start_service(path, args, settings, self._resources)
        settings.service = self._service
        self._app = App(settings)

    async def answer(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        """What the application sends, as it comes."""
        self._held.add(marks(request.prefix))
        async with aclosing(answered(self._app.asgi, request, self._name)) as batches:
            async for messages in batches:
                yield messages

    async def tell(self, what: str) -> tuple[str, Any]:
        """Its name, and its counters or slots."""
        if what == "metrics":
            return self._name, [*metrics.families(self._service.scheduler)]
        return self._name, native.slots(self._service)

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray Serve every now and then: what routers should know."""
        return {"held": self._held.newest(TOLD)}

    def check_health(self) -> None:
        """Called by Ray Serve, which starts another one in the place of one that is not well."""
        if not self._service.scheduler.alive:
            raise OrthrusError("the scheduler's thread has ended")

    def __del__(self) -> None:
        """Called by Ray Serve when the answers under way have ended, or may not go on."""
        if (service := getattr(self, "_service", None)) is not None:
            service.scheduler.stop(now=True)
            self._resources.close()
