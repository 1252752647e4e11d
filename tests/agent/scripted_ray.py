"""Ray's API with the answers that a test sets."""

from __future__ import annotations

from typing import Any

from agent.events import Events
from agent.ray_node.api import RayApi, RayUnavailable


class Ray(RayApi):
    """Ray's answers as a test sets them."""

    def __init__(self) -> None:
        self.driver = ""
        self.alive: list[dict[str, Any]] = []
        self.applications: list[str] = []
        self.members: list[dict[str, Any]] = []
        self.away = False

    def _there(self) -> None:
        if self.away:
            raise RayUnavailable("away for a test")

    def driver_reason(self) -> str:
        self._there()
        return self.driver

    def actors(self) -> list[dict[str, Any]]:
        self._there()
        return self.alive

    def serve_applications(self) -> list[str]:
        self._there()
        return self.applications

    def nodes(self) -> list[dict[str, Any]]:
        self._there()
        return self.members


def told(events: Events, kind: str) -> list[dict[str, Any]]:
    return [f["data"] for f in events.pending() if f["kind"] == kind]
