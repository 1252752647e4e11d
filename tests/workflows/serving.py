"""Ray Serve on a fake head with our gate in its proxy, and people who send requests by the load balancer's weights."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from clouds.contract.balancer import Backend
from heliostat.models.agents import CommandKind, FactKind, ServeApplication, ServeStatus, ServeTraffic
from heliostat.models.common import utcnow
from heliostat.models.services import LATENCY_BOUNDS_MS
from store.commands import OpenCommand
from store.database import Database, insert
from store.tables import reports

if TYPE_CHECKING:
    from tests.workflows.balancer import WatchedBalancer
    from tests.workflows.fleet import FakeAgent, FakeFleet

TICK_S = 0.05
OLD_S = 60.0
"""Age that a hanging request says at once."""
FAILING_PROBE_S = 0.2
"""A probe is given up after so long here, not after the ``give_up_s`` that it is told."""
PROBE_S = 2.0
"""For so long a probe waits for the load balancer to know its backend."""


class FakeServe:
    """Serve on one head. What the versions do is the fleet's ``serve_plans``."""

    kinds = (CommandKind.SERVE_DEPLOY, CommandKind.SERVE_PROBE, CommandKind.SERVE_GATE, CommandKind.SERVE_DRAIN)

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.status = ServeStatus()
        """As told last."""
        self.serving = ""
        """Version whose replicas take requests: a bad deploy leaves those of the one before."""
        self.probed: set[str] = set()
        """Versions that have passed a probe here."""
        self.drained = False
        """The last drain was answered, with nothing left or at its timeout."""
        self.gate: dict[str, Any] = {}
        self.draining = False
        self.traffic = ServeTraffic()
        self._refused: set[str] = set()

    @property
    def address(self) -> str:
        return f"{self.agent.ip}:8000"

    async def result(self, command: OpenCommand) -> dict[str, Any] | None:
        """None: no answer is given."""
        args = command.args
        version = str(args.get("version_id") or self.status.version_id)
        if command.kind in self.agent.fleet.serve_plan(version).silent:
            return None
        match command.kind:
            case CommandKind.SERVE_DEPLOY:
                return self._deploy(command)
            case CommandKind.SERVE_PROBE:
                return _done(await self._probe(args))
            case CommandKind.SERVE_GATE:
                self.gate, self.draining = args["gate"], args["draining"]
                self.drained = self.drained and self.draining
                return _done({})
            case _:
                return _done(self._drain(args))

    # -- deploys

    def _deploy(self, command: OpenCommand) -> dict[str, Any]:
        args = command.args
        version = args["version_id"]
        plan = self.agent.fleet.serve_plan(version)
        if plan.refuse and not (plan.retryable and command.id in self._refused):
            self._refused.add(command.id)
            return {"ok": False, "result": {}, "error": plan.refuse, "retryable": plan.retryable}
        self.agent.fleet.deployed[version].add(self.agent.cluster_id)
        capacity = args["target_capacity"]
        self.agent.fleet.capacities.append((version, 100 if capacity is None else capacity))
        self.gate = args["gate"]
        self.status = ServeStatus(
            version_id=version,
            deploy=command.id,
            message="application default: DEPLOYING",
            applications={"default": ServeApplication(status="DEPLOYING")},
            http=self.address,
        )
        self.agent.fleet.spawn(self._come_up(command.id))
        return _done({"http": self.address, "grpc": ""})

    async def _come_up(self, deploy: str) -> None:
        """What becomes of a deploy that Serve took, unless another one has replaced it."""
        await self._tell()
        plan = self.agent.fleet.serve_plan(self.status.version_id)
        await asyncio.sleep(plan.healthy_after_s)
        if self.status.deploy != deploy:
            return
        if plan.failed:
            await self.become(False, plan.failed, failed=True)
        elif plan.healthy:
            await self.become(True)

    async def become(self, healthy: bool, message: str = "", *, failed: bool = False) -> None:
        """Serve says something else of what was deployed last."""
        word = "RUNNING" if healthy else "DEPLOY_FAILED" if failed else "UNHEALTHY"
        self.status = self.status.model_copy(
            update={
                "healthy": healthy,
                "failed": failed,
                "message": message,
                "applications": {"default": ServeApplication(status=word, message=message)},
            }
        )
        if healthy and self.serving != self.status.version_id:
            self.serving = self.status.version_id
            self.traffic = ServeTraffic(version_id=self.serving)
        await self._tell()

    async def _tell(self) -> None:
        if self.agent.up:
            await self.agent.tell(FactKind.SERVE, **self.status.model_dump(mode="json"))

    # -- probes and drains

    async def _probe(self, args: dict[str, Any]) -> dict[str, Any]:
        """As a request that names this cluster would be answered: by the load balancer first, then by us."""
        plan = self.agent.fleet.serve_plan(args["version_id"])
        if plan.probe:
            await asyncio.sleep(min(args["give_up_s"], FAILING_PROBE_S))
        words = plan.probe or await self._unreachable(args)
        status = None if words else 200
        found = {p["application"]: {"status": status, "ms": 1.0, "message": words} for p in args["probes"]}
        if not words:
            self.probed.add(args["version_id"])
        return {"healthy": not words, "message": words, "applications": found}

    async def _unreachable(self, args: dict[str, Any]) -> str:
        fleet = self.agent.fleet
        if self.serving != args["version_id"]:
            return f"answered by version {self.serving or 'none'}"
        assert fleet.balancer is not None
        service_id = await fleet.service_of(self.agent.cluster_id)
        for _ in range(int(min(args["give_up_s"], PROBE_S) / TICK_S) + 1):
            known = any(
                b.id == args["cluster_id"] and b.http == self.address for b in fleet.balancer.backends(service_id)
            )
            if known and fleet.balancer.url_of(service_id) == args["url"]:
                return ""
            await asyncio.sleep(TICK_S)
        return "503 by the load balancer: it knows no such backend"

    def _drain(self, args: dict[str, Any]) -> dict[str, Any]:
        left = self.agent.fleet.serve_plan(self.serving).ongoing
        self.draining = self.drained = True
        seconds = float(args["timeout_s"]) if left else 1.0
        return {"drained": not left, "ongoing": left, "connections": left, "seconds": seconds}


def _done(result: dict[str, Any]) -> dict[str, Any]:
    return {"ok": True, "result": result, "error": "", "retryable": False}


@dataclass
class People:
    """Send requests to a service by the weights of now, and write what the heads' gates saw into the reports, as the
    API does with those that agents send."""

    fleet: FakeFleet
    db: Database
    balancer: WatchedBalancer
    per_s: float = 0
    """Requests a (real) second to each service that has an endpoint."""
    ahead: timedelta = timedelta(0)
    """By so much the clock of the service's workflow was skipped: ``last_request_at`` is in its time."""
    sent: Counter[str] = field(default_factory=Counter)
    """By version id: answered by it."""
    lost: Counter[str] = field(default_factory=Counter)
    """By cluster id: nobody was there who could have answered."""
    _owed: Counter[str] = field(default_factory=Counter)
    _seq: int = 0

    async def live(self) -> None:
        """Until cancelled."""
        while True:
            await self.tick(TICK_S)
            await asyncio.sleep(TICK_S)

    async def tick(self, seconds: float) -> None:
        """Sends what is due after so long, and reports."""
        for service_id in self.balancer.services():
            backends = [b for b in self.balancer.backends(service_id) if b.weight]
            total = sum({b.version_id: b.weight for b in backends}.values())
            for backend in backends:
                alike = sum(1 for b in backends if b.version_id == backend.version_id)
                share = backend.weight / total / alike
                self._owed[backend.id] += self.per_s * seconds * share  # type: ignore[assignment]
                whole = int(self._owed[backend.id])
                self._owed[backend.id] -= whole
                if whole:
                    await self._send(backend, whole)
        await self._report()

    async def _send(self, backend: Backend, number: int) -> None:
        head = self.fleet.heads.get(backend.id)
        if head is None or not head.up or not head.serve.serving:
            self.lost[backend.id] += number
            return
        serve = head.serve
        plan = self.fleet.serve_plan(serve.serving)
        old = serve.traffic
        if plan.hang:
            serve.traffic = old.model_copy(update={"ongoing": old.ongoing + number, "oldest_s": OLD_S})
            return
        errors = int((old.requests + number) * plan.error_share) - old.errors
        buckets = list(old.buckets) or [0] * (len(LATENCY_BOUNDS_MS) + 1)
        buckets[bisect_left(LATENCY_BOUNDS_MS, plan.latency_ms)] += number
        requests, errors = old.requests + number, old.errors + max(errors, 0)
        serve.traffic = ServeTraffic(
            version_id=serve.serving,
            requests=requests,
            errors=errors,
            buckets=buckets,
            last_request_at=utcnow() + self.ahead,
            window_s=60,
            window_requests=requests,
            window_errors=errors,
            window_buckets=buckets,
        )
        self.sent[serve.serving] += number
        if plan.sick_in_traffic and serve.status.healthy:
            await serve.become(False, plan.sick_in_traffic)

    async def _report(self) -> None:
        self._seq += 1
        now = utcnow()
        rows = [
            {
                "node_id": head.node_id,
                "cluster_id": head.cluster_id,
                "is_head": True,
                "seq": self._seq,
                "activity": "busy",
                "doc": {
                    "serve": head.serve.traffic.model_copy(update={"draining": head.serve.draining}).model_dump(
                        mode="json"
                    )
                },
                "at": now,
            }
            for head in self.fleet.heads.values()
            if head.up and head.serve.serving
        ]
        if rows:
            async with self.db.begin() as conn:
                row = insert(conn, reports)
                new = row.excluded
                await conn.execute(
                    row.on_conflict_do_update(
                        index_elements=["node_id"], set_={k: new[k] for k in ("seq", "activity", "doc", "at")}
                    ),
                    rows,
                )
