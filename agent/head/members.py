"""The workers of this head as Ray sees them: which are alive, which are lost."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from agent.constants import Constants
from agent.events import Events
from agent.ray_node.api import RayApi, RayUnavailable
from agent.ray_node.autoscaler import Scaling

log = logging.getLogger("agent.head.members")
IDLE_END = "idle"
"""In Ray's ``state_message`` of a worker that its autoscaler released: "Terminated due to idle (no Ray activity)"."""


class Members:
    """Reports ``ray_ready`` when Ray calls a worker alive, and ``node_lost`` when Ray calls it dead and nobody released
    it. The node's id is Ray's node *name*; Ray's node ids distinguish two lives of one node."""

    def __init__(self, ray: RayApi, events: Events, scaling: Scaling | None, constants: Constants) -> None:
        self._ray = ray
        self._events = events
        self._scaling = scaling
        self._constants = constants
        self._alive: dict[str, str] = {}
        """Ray's node id → the node's id."""
        self._dead: set[str] = set()
        self._released: dict[str, float] = {}
        self._refreshing = threading.Lock()
        self.resources: dict[str, Any] = {}
        """Totals of the nodes that are alive, for people."""

    @property
    def workers_alive(self) -> list[str]:
        return sorted(set(self._alive.values()))

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``; more often while a worker that has registered is about to join."""
        while not stop.is_set():
            try:
                self.refresh()
            except RayUnavailable as error:
                log.warning("Ray's node list is unavailable: %s", error)
                stop.wait(self._constants.members_slow_s)
                continue
            joining = self._scaling is not None and any(
                state == "REGISTERED" and node not in self.workers_alive
                for node, state in self._scaling.workers().items()
            )
            stop.wait(self._constants.members_fast_s if joining else self._constants.members_slow_s)

    def refresh_before_terminate(self) -> None:
        """Ray's autoscaler terminates a dead worker like an idle one, maybe before the next refresh. Without this
        refresh the loss would look like a request for fewer nodes."""
        try:
            self.refresh()
        except RayUnavailable as error:
            log.warning("Ray's node list is unavailable before the termination of a worker: %s", error)

    def refresh(self) -> None:
        """Raises RayUnavailable."""
        with self._refreshing:
            self._refresh()

    def _refresh(self) -> None:
        nodes = self._ray.nodes()
        totals: dict[str, float] = {}
        for node in nodes:
            if node["state"] == "ALIVE":
                for key, value in (node.get("resources_total") or {}).items():
                    if ":" not in key:  # node:<ip> and the like are internal to Ray
                        totals[key] = totals.get(key, 0) + value
        self.resources = {"total": totals, "nodes_alive": sum(n["state"] == "ALIVE" for n in nodes)}
        for node in nodes:
            if node["is_head_node"]:
                continue
            ray_id, name = node["node_id"], node["node_name"]
            if node["state"] == "ALIVE" and ray_id not in self._alive:
                self._alive[ray_id] = name
                self._events.add("ray_ready", node_id=name, ray_node_id=ray_id)
            elif node["state"] == "DEAD" and ray_id not in self._dead:
                self._dead.add(ray_id)
                self._alive.pop(ray_id, None)
                if name not in self._alive.values():
                    self._on_death(name, str(node.get("state_message") or "Ray calls it dead"))
        for name, since in list(self._released.items()):
            if time.monotonic() - since > self._constants.idle_drain_grace_s:
                del self._released[name]
                self._on_loss(name, "Ray drained it as idle, but its autoscaler did not terminate it")

    def _on_death(self, name: str, message: str) -> None:
        if IDLE_END in message.lower():
            # The autoscaler terminates it in its next round; a ``node_lost`` would have it replaced.
            self._released[name] = time.monotonic()
        else:
            self._on_loss(name, message)

    def _on_loss(self, name: str, reason: str) -> None:
        if self._scaling is None or self._scaling.lost(name):
            self._events.add("node_lost", node_id=name, reason=reason[:500])
