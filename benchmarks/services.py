"""What the benchmarks of services share: the test application as a service of a stack of its own, under load."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.load import Load
from benchmarks.load_report import Failure
from benchmarks.stack import ROOT, Stack, running
from clouds.local.machines import supervisor
from heliostat import AsyncClient
from heliostat.models.clusters import NodeRole
from heliostat.models.common import Event
from heliostat.models.services import Service, ServiceDeploy, ServiceState, ServiceVersion, ServiceVersionState

APP = ROOT / "tests" / "e2e" / "service_app"
NAME = "bench"
LIVE_S = 900.0
"""From a deploy until its version has what it was to have, on a machine that is busy."""
LEAST = {"steps": [5, 10, 20, 30, 50, 75, 100], "hold_s": 1}
"""Anyscale's progression with the least hold times."""
T = TypeVar("T")


def config(
    version: str,
    *,
    name: str = NAME,
    workers: int = 0,
    cluster_replicas: int = 1,
    import_path: str = "app:build",
    rollout: dict[str, Any] | None = None,
    **args: Any,
) -> dict[str, Any]:
    """A ``ServiceConfig`` of the test application; ``args``: of its builder. With ``workers`` its replicas are on
    these, one on each, and none is on the head."""
    groups = [{"name": "w", "resources": {"CPU": 1}, "min_nodes": workers, "max_nodes": workers + 1}]
    application: dict[str, Any] = {"import_path": import_path, "args": {"version": version, **args}}
    if workers:
        application["args"]["replicas"] = workers
        application["deployments"] = [{"name": "Echo", "max_replicas_per_node": 1, "num_replicas": workers}]
    return {
        "name": name,
        "version_name": version,
        "working_dir": str(APP),
        "applications": [application],
        "cluster_replicas": cluster_replicas,
        "compute_config": {
            "head_node": {"resources": {"CPU": 0 if workers else 1}},
            "worker_nodes": groups if workers else [],
        },
        "rollout": rollout or LEAST,
    }


@dataclass
class Bench:
    """One service on one stack, by the SDK."""

    stack: Stack
    client: AsyncClient

    async def get(self) -> Service:
        return await self.client.services.get(NAME)

    async def ask(self, made: dict[str, Any], **options: Any) -> tuple[Service, ServiceDeploy]:
        """Deploys and does not wait."""
        deploy = ServiceDeploy.model_validate({"config": made, **options})
        return await self.client.services.deploy(deploy), deploy

    async def deploy(self, made: dict[str, Any], **options: Any) -> Service:
        """Deploys and waits. Raises WorkloadFailed when the version is not to be had."""
        service, deploy = await self.ask(made, **options)
        return await self.client.services.wait_deployed(service, deploy, timeout=LIVE_S)

    async def until(self, what: str, ask: Callable[[Service], T | None], timeout_s: float = LIVE_S) -> T:
        """Looks every 100 ms until the answer is truthy."""
        deadline = time.monotonic() + timeout_s
        while True:
            service = await self.get()
            found = ask(service)
            if found:
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not within {timeout_s:.0f} s; {service.state} {service.reason}")
            await asyncio.sleep(0.1)

    async def one_version(self) -> Service:
        """Once the service runs and all other versions have ended."""

        def settled(service: Service) -> Service | None:
            alive = [v for v in service.versions if v.state != ServiceVersionState.TERMINATED]
            return service if service.state == ServiceState.RUNNING and len(alive) == 1 else None

        return await self.until("one version alone", settled)

    async def settled(self) -> Service:
        """Once the service runs without a rollout, whatever is kept beside it."""
        return await self.until(
            "the service at rest", lambda s: s if s.state == ServiceState.RUNNING and s.rollout is None else None
        )

    async def events(self, since: datetime, *kinds: str) -> list[Event]:
        return [e async for e in self.client.services.events(NAME) if e.at >= since and (not kinds or e.kind in kinds)]

    async def end(self) -> None:
        await self.client.services.terminate(NAME)
        await self.client.services.wait(NAME, state=ServiceState.TERMINATED, timeout=LIVE_S)

    async def head_machine(self, cluster_id: str) -> str:
        async for node in self.client.clusters.nodes(cluster_id):
            if node.role == NodeRole.HEAD and node.machine_id and node.state == "RUNNING":
                return node.machine_id
        raise RuntimeError(f"cluster {cluster_id} has no running head")

    async def power_cut(self, machine_id: str) -> None:
        """kill -9 of a machine's first process, which takes along all that runs on it. First by its age: the lowest
        number may be a replica's, for they begin anew at 32,768."""
        pids = node_processes(self.stack.home.path, machine_id)
        os.kill(min(pids, key=lambda pid: supervisor.start_time(pid) or sys.maxsize), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while node_processes(self.stack.home.path, machine_id):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes of {machine_id} outlive its first one")
            await asyncio.sleep(0.1)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    async with running() as (stack, _fleet):
        token = stack.home.token_file.read_text().strip()
        async with AsyncClient(stack.home.state()["api_url"], token) as client:
            yield Bench(stack, client)


def load_on(service: Service, **options: Any) -> Load:
    assert service.query_url is not None
    return Load(service.query_url, service.query_auth_token or "", **options)


def node_processes(home: Path, machine_id: str) -> list[int]:
    mark = f"HELIOSTAT_NODE_DIR={home}/machines/{machine_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            if any(item.startswith(mark) for item in environ.split(b"\0")):
                found.append(int(entry.name))
    return found


def version_of(service: Service, name: str) -> ServiceVersion:
    """The newest of that name."""
    return max((v for v in service.versions if v.name == name), key=lambda v: v.number)


@dataclass
class Part:
    """One thing that was done under a load."""

    what: str
    seconds: float
    sent: int
    failed: int
    failures: list[str]

    def row(self) -> dict[str, Any]:
        return self.__dict__.copy()


async def part(load: Load, what: str, work: Callable[[], Awaitable[Any]]) -> Part:
    """Does it under the load; then gives what was under way time to end, so that failures stand at their cause."""
    began, before = load.elapsed, load.report()
    await work()
    seconds = load.elapsed - began
    await asyncio.sleep(6)  # the longest request takes 5 s
    now = load.report()
    failures: list[Failure] = now.failures[before.failed :]
    made = Part(what, round(seconds, 1), now.sent - before.sent, now.failed - before.failed, [str(f) for f in failures])
    print(f"  {what}: {made.seconds} s, {made.sent} requests, {made.failed} failed", flush=True)
    for failure in made.failures[:5]:
        print(f"    {failure}", flush=True)
    return made
