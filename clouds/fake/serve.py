"""Ray Serve on the heads of ``clouds.fake.agent``: every deploy succeeds, every drain is done at once, and the reports
tell of a steady traffic that nobody sends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

BUCKETS = 28
"""As ``heliostat.models.services.latency.LATENCY_BOUNDS_MS`` and one more (a test compares)."""
BUCKET = 6
"""All answers begin within 10 to 15 ms."""
WINDOW_S = 60.0


class FakeServe:
    """One head's. Not thread-safe: it lives on the fleet's loop.

    Args:
        address: ``ip:port`` of the proxy that is not there.
        healthy_s: from a deploy until it is healthy, seconds.
        requests_per_s: answered once something is healthy, until it is drained.
        tell: says a SERVE fact, whose data is a dumped ``ServeStatus``.
    """

    def __init__(
        self, address: str, healthy_s: float, requests_per_s: float, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self.status: dict[str, Any] = {}
        """As last reported; empty before the first deploy."""
        self.gate: dict[str, Any] = {}
        self.draining = False
        self._address, self._healthy_s, self._rate, self._tell = address, healthy_s, requests_per_s, tell
        self._requests = 0.0
        self._since: float | None = None
        """Since when requests are answered that are not counted in ``_requests`` yet, by the loop's clock."""
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def result(self, command: dict[str, Any]) -> dict[str, Any]:
        """What a SERVE_… command answers: a dumped ``CommandResult``."""
        kind, args = command["kind"], command["args"]
        if kind == "serve_deploy":
            self._deploy(command["id"], args)
            return {"ok": True, "result": {"http": self._address, "grpc": ""}}
        if kind == "serve_probe":
            return {"ok": True, "result": self._probe(args)}
        if kind == "serve_gate":
            self.gate = args["gate"]
            self._drain(bool(args["draining"]))
            return {"ok": True, "result": {}}
        self._drain(True)
        return {"ok": True, "result": {"drained": True, "ongoing": 0, "connections": 0, "seconds": 1.0}}

    def traffic(self) -> dict[str, Any] | None:
        """A dumped ``ServeTraffic`` for the report; None before the first deploy."""
        if not self.status:
            return None
        self._count()
        now, requests = asyncio.get_running_loop().time(), int(self._requests)
        window_s = min(now - self._began, WINDOW_S)
        recent = min(requests, int(self._rate * window_s)) if self._since is not None else 0
        return {
            "version_id": self.status["version_id"],
            "requests": requests,
            "buckets": _histogram(requests),
            "connections": 1 if self._since is not None else 0,
            "draining": self.draining,
            "last_request_at": datetime.now(UTC).isoformat() if recent else None,
            "window_s": window_s,
            "window_requests": recent,
            "window_buckets": _histogram(recent),
        }

    def stop(self) -> None:
        """The machine has lost its power."""
        if self._timer is not None:
            self._timer.cancel()

    def _deploy(self, command_id: str, args: dict[str, Any]) -> None:
        self.stop()
        self.gate = args["gate"]
        if self.status.get("version_id") != args["version_id"]:
            self._count()
            self._requests, self._since, self._began = 0.0, None, asyncio.get_running_loop().time()
        self.status = {"version_id": args["version_id"], "deploy": command_id, "http": self._address, "grpc": ""}
        self._say(healthy=False, message="application default: DEPLOYING", word="DEPLOYING")
        self._timer = asyncio.get_running_loop().call_later(self._healthy_s, self._become_healthy)

    def _become_healthy(self) -> None:
        self._say(healthy=True, message="", word="RUNNING")
        self._drain(self.draining)

    def _say(self, *, healthy: bool, message: str, word: str) -> None:
        self.status = self.status | {
            "healthy": healthy,
            "failed": False,
            "message": message,
            "applications": {"default": {"status": word, "message": message, "deployments": {}}},
        }
        self._tell(self.status)

    def _probe(self, args: dict[str, Any]) -> dict[str, Any]:
        healthy = self.status.get("healthy", False) and self.status["version_id"] == args["version_id"]
        message = "" if healthy else "the fake application is not healthy"
        answer = {"status": 200 if healthy else None, "ms": 12.0, "message": message}
        return {
            "healthy": healthy,
            "message": message,
            "applications": {probe["application"]: answer for probe in args["probes"]},
        }

    def _drain(self, draining: bool) -> None:
        self._count()
        self.draining = draining
        answers = self.status.get("healthy", False) and not draining
        self._since = asyncio.get_running_loop().time() if answers else None

    def _count(self) -> None:
        if self._since is not None:
            now = asyncio.get_running_loop().time()
            self._requests += self._rate * (now - self._since)
            self._since = now


def _histogram(requests: int) -> list[int]:
    return [requests if i == BUCKET else 0 for i in range(BUCKETS)]
