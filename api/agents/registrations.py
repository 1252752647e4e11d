"""Registered nodes on their way to their clusters' workflows."""

from __future__ import annotations

import asyncio

from temporalio.client import Client

from api.agents.fleet import gone
from api.agents.signals import delivered
from heliostat.errors import InvalidRequest
from heliostat.models.agents import RegisterRequest
from runtime.messages.clusters import ClusterHandle, NodeRegistered

SIGNAL_S = 5.0
REGISTRATIONS_MAX = 500
"""In one message: 100 KB, where a payload may have 2 MB."""


class Registrations:
    """Signals workflows that nodes have registered. One message per cluster is sent at a time; nodes that register
    meanwhile share the next one, so that a hundred nodes at once are a few messages and a few workflow tasks."""

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal
        self._waiting: dict[str, list[tuple[NodeRegistered, asyncio.Future[bool]]]] = {}
        self._sending: dict[str, asyncio.Task[None]] = {}

    async def signal(self, cluster_id: str, body: RegisterRequest) -> None:
        """Returns when Temporal has stored it, so that no node is up that its workflow does not know. Raises Gone, or
        Unavailable: the agent repeats the call."""
        message = NodeRegistered(
            event_id=f"{body.node_id}/registered/{body.generation}/{body.boot_id[:64]}",
            node_id=body.node_id,
            generation=body.generation,
            ip=body.ip,
        )
        stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(cluster_id, []).append((message, stored))
        if cluster_id not in self._sending:
            self._sending[cluster_id] = asyncio.create_task(self._run(cluster_id))
        if not await stored:
            raise gone(body.node_id)

    async def _run(self, cluster_id: str) -> None:
        cluster = ClusterHandle(self._temporal, cluster_id)
        while waiting := self._waiting.pop(cluster_id, []):
            batches = [waiting[i : i + REGISTRATIONS_MAX] for i in range(0, len(waiting), REGISTRATIONS_MAX)]
            while batches:
                batch = batches.pop(0)
                messages = [message for message, _ in batch]
                call = (
                    cluster.node_registered(messages[0], timeout_s=SIGNAL_S)
                    if len(messages) == 1
                    else cluster.nodes_registered(messages, timeout_s=SIGNAL_S)
                )
                try:
                    exists = await delivered(call, SIGNAL_S)
                except Exception as error:  # noqa: BLE001 - each waiting caller raises it
                    if isinstance(error, InvalidRequest) and len(batch) > 1:  # one of them is at fault
                        batches[:0] = [[one] for one in batch]
                        continue
                    for _, future in batch:
                        if not future.done():  # a caller that has left has cancelled its own
                            future.set_exception(error)
                else:
                    for _, future in batch:
                        if not future.done():
                            future.set_result(exists)
        del self._sending[cluster_id]  # nothing was awaited since the list was seen empty
