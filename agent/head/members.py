"""The head's look at its workers: which of them Ray calls alive, which it has lost."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from agent.constants import Constants
from agent.facts import Facts
from agent.ray_node.api import RayApi, RayAway
from agent.ray_node.autoscaler import Scaling

log = logging.getLogger("agent.head.members")
IDLE_END = "idle"
"""In Ray's ``state_message`` of a worker that its autoscaler let go: "Terminated due to idle (no Ray activity)"."""


class Members:
    """Tells RAY_READY when a worker is alive in Ray's eyes and NODE_LOST when Ray calls it dead and nobody let it go.
    Ray's node ids tell two lives of one node apart; our node id is Ray's node *name*."""

    def __init__(self, ray: RayApi, facts: Facts, scaling: Scaling | None, constants: Constants) -> None:
        self._ray = ray
        self._facts = facts
        self._scaling = scaling
        self._constants = constants
        self._alive: dict[str, str] = {}
        """Ray's node id → our node id."""
        self._dead: set[str] = set()
        self._let_go: dict[str, float] = {}
        self._looking = threading.Lock()
        self.resources: dict[str, Any] = {}
        """Totals of what is alive, for people."""

    @property
    def workers_alive(self) -> list[str]:
        return sorted(set(self._alive.values()))

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``; more often while a worker that has registered is about to join."""
        while not stop.is_set():
            try:
                self.look()
            except RayAway as error:
                log.warning("Ray's node list can't be had: %s", error)
                stop.wait(self._constants.members_slow_s)
                continue
            joining = self._scaling is not None and any(
                state == "REGISTERED" and node not in self.workers_alive
                for node, state in self._scaling.workers().items()
            )
            stop.wait(self._constants.members_fast_s if joining else self._constants.members_slow_s)

    def look_before_an_end(self) -> None:
        """Ray's autoscaler ends a worker that died just as it ends an idle one, maybe before our next look: without
        this one the loss would be taken for a wish for fewer nodes."""
        try:
            self.look()
        except RayAway as error:
            log.warning("Ray's node list can't be had before a worker is let go: %s", error)

    def look(self) -> None:
        """Raises RayAway."""
        with self._looking:
            self._look()

    def _look(self) -> None:
        nodes = self._ray.nodes()
        totals: dict[str, float] = {}
        for node in nodes:
            if node["state"] == "ALIVE":
                for key, value in (node.get("resources_total") or {}).items():
                    if ":" not in key:  # node:<ip> and the like are Ray's own
                        totals[key] = totals.get(key, 0) + value
        self.resources = {"total": totals, "nodes_alive": sum(n["state"] == "ALIVE" for n in nodes)}
        for node in nodes:
            if node["is_head_node"]:
                continue
            ray_id, name = node["node_id"], node["node_name"]
            if node["state"] == "ALIVE" and ray_id not in self._alive:
                self._alive[ray_id] = name
                self._facts.add("ray_ready", node_id=name, ray_node_id=ray_id)
            elif node["state"] == "DEAD" and ray_id not in self._dead:
                self._dead.add(ray_id)
                self._alive.pop(ray_id, None)
                if name not in self._alive.values():
                    self._died(name, str(node.get("state_message") or "Ray calls it dead"))
        for name, since in list(self._let_go.items()):
            if time.monotonic() - since > self._constants.idle_drain_grace_s:
                del self._let_go[name]
                self._lost(name, "Ray drained it as idle, but its autoscaler never let it go")

    def _died(self, name: str, message: str) -> None:
        if IDLE_END in message.lower():
            # The autoscaler will call terminate for it in its next round; a NODE_LOST would have it replaced.
            self._let_go[name] = time.monotonic()
        else:
            self._lost(name, message)

    def _lost(self, name: str, reason: str) -> None:
        if self._scaling is None or self._scaling.lost(name):
            self._facts.add("node_lost", node_id=name, reason=reason[:500])
