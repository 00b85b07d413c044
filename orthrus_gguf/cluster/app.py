"""orthrus-server on more than one machine, as an application of Ray Serve.

    serve run orthrus_gguf.cluster.app:build model=model.gguf replicas=2 parallel=4

`build` takes the flags of `orthrus-server`, and what Ray has to know (`Layout`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message

from orthrus_gguf.cluster.affinity import affinity
from orthrus_gguf.cluster.forwarding import Forwarded
from orthrus_gguf.cluster.gateway import RETRY, Gateway, LostError
from orthrus_gguf.cluster.layout import Layout, read
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.server.api_errors import ApiError
from orthrus_gguf.server.app import Settings

try:
    from ray import serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
    from ray.serve.handle import DeploymentHandle

    from orthrus_gguf.cluster.replica import Replica
except ModuleNotFoundError as error:
    raise OrthrusError(
        f"the package {error.name} is missing: pip install 'orthrus-gguf[ray]'"
    ) from error

#: Seconds that a question to all replicas may take.
ASK_SECONDS = 10.0

#: Seconds between two reports of what a replica holds.
REPORT_SECONDS = 2.0


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application; raises OrthrusError where an argument is wrong.

    args: `model` (a file) or `hf_repo`, any flag of `orthrus-server` without its dashes, and the
    fields of `Layout`.
    """
    layout, flags, settings = read(args)
    replicas = serve.deployment(Replica).options(
        name="Replica",
        ray_actor_options={"num_cpus": layout.cpus, "num_gpus": layout.gpus},
        max_ongoing_requests=layout.ongoing,
        max_queued_requests=layout.ongoing * layout.most,
        graceful_shutdown_timeout_s=layout.drain,
        request_router_config={
            "request_router_class": "orthrus_gguf.cluster.router.PrefixRouter",
            "request_router_kwargs": {"slack": layout.parallel},
            "request_routing_stats_period_s": REPORT_SECONDS,
        },
        **_scale(layout),
    )
    door = serve.deployment(serve.ingress()(Door)).options(
        name="Door",
        num_replicas=layout.doors,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * layout.ongoing * layout.most,
        graceful_shutdown_timeout_s=layout.drain,
    )
    return door.bind(replicas.bind(flags), settings)


def _scale(layout: Layout) -> dict[str, Any]:
    if layout.least == layout.most:
        return {"num_replicas": layout.most}
    scaling = {
        "min_replicas": layout.least,
        "max_replicas": layout.most,
        "target_ongoing_requests": layout.parallel,
    }
    return {"autoscaling_config": scaling}


class Door:
    """The deployment that HTTP comes to."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        self._gateway = Gateway(_Replicas(replicas), settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve."""
        return self._gateway


class _Replicas:
    """The replicas behind a handle (`gateway.Cluster`)."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._answer = handle.options(stream=True, method_name="answer")
        self._affinity = affinity(handle.deployment_id)

    def replicas(self) -> Sequence[str]:
        return self._affinity.replicas

    async def send(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        answer, over = self._answer.remote(request), False
        try:
            async for messages in answer:
                yield messages
            over = True
        except BackPressureError as error:
            told = "too many requests wait already; try again later, or raise --queue"
            raise ApiError(told, status=429, retry_after=RETRY) from error
        except (RayError, DeploymentUnavailableError) as error:
            if isinstance(error, RayTaskError):  # a bug, not a death
                raise
            raise LostError(str(error)) from error
        finally:
            if not over:
                answer.cancel()

    async def ask_all(self, what: str) -> Mapping[str, Any]:
        asked = self._handle.broadcast("tell", what)
        try:
            found = await asked.results_async(timeout_s=ASK_SECONDS, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError) as error:
            told = "the replicas do not answer; try again"
            raise ApiError(told, status=503, retry_after=RETRY) from error
        return dict(answer for answer in found if not isinstance(answer, BaseException))
