"""Ray Serve's request router for replicas: `Affinity` decides.

Ray sends this module to other processes by value: whatever is to be one thing in a process must not
stand here.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from orthrus_gguf.cluster.affinity import affinity, marks
from orthrus_gguf.cluster.forwarding import Forwarded
from orthrus_gguf.cluster.prefixes import Prefix


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that holds its prompt, within reason (`Affinity`), or to the
    one that it names."""

    def initialize_state(self, slack: int) -> None:
        """Called by Ray Serve with what the deployment says."""
        self._affinity = affinity(self._deployment_id)
        self._affinity.slack = slack

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas are now these."""
        super().update_replicas(replicas)
        self._affinity.update(replica.replica_id.unique_id for replica in replicas)
        for replica in replicas:
            self._affinity.holds(
                replica.replica_id.unique_id, replica.routing_stats.get("held", ())
            )

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """One is no more, though the controller does not know it yet."""
        super().on_replica_actor_died(replica_id)
        self._affinity.gone(replica_id.unique_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Candidates, the best first: the next one is asked where one has too much to do."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        request = _request(pending_request)
        if request is not None and request.replica in known:
            return [[known[request.replica]]]
        ranked = self._affinity.ranked(_prefix(request))
        return [[known[name]] for name in ranked if name in known] or [candidate_replicas]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """It is on its way."""
        super().on_send_request(replica_id)
        self._affinity.began(replica_id.unique_id)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """The replica has accepted it."""
        prefix = _prefix(_request(pending_request))
        self._affinity.holds(replica_id.unique_id, marks(prefix))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It is over, or was not accepted after all."""
        self._affinity.ended(replica_id.unique_id)


def _request(pending: PendingRequest) -> Forwarded | None:
    first = pending.args[0] if pending.args else None
    return first if isinstance(first, Forwarded) else None


def _prefix(request: Forwarded | None) -> Prefix:
    return () if request is None else request.prefix
