"""A world with a service in it: as the API, it writes the rows and gives deploys; it watches the load balancer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from temporalio.client import Client, Interceptor

from activities import canaries
from heliostat.models.clusters import ClusterState, Node
from heliostat.models.common import new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import (
    ApplicationConfig,
    ProbeConfig,
    RolloutAction,
    RolloutConfig,
    Service,
    ServiceConfig,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
)
from runtime.messages.clusters import HeadSilent
from runtime.messages.services import (
    DeployRequest,
    GateTokens,
    RollbackOrder,
    RolloutOrder,
    ServiceInput,
    VersionSpec,
    deploy_service,
)
from store.services.deploys import insert_deploy, insert_service, insert_version, reopen_service
from store.services.rows import load_service, lock_service, versions_of
from store.tables import clusters, service_deploys
from tests.workflows.balancer import WatchedBalancer
from tests.workflows.fleet import LOOK_S, FakeAgent
from tests.workflows.plans import ServePlan
from tests.workflows.serving import People
from tests.workflows.world import WAIT_S, World, make_world

TOKENS = GateTokens(enabled=True, hashes=["ab" * 32])
AT_ONCE = RolloutConfig(steps=[100], hold_s=1, drain_timeout_s=5)
"""No steps, for tests of something else."""
IN_STEPS = RolloutConfig(steps=[25, 50, 100], hold_s=1, drain_timeout_s=5)
"""The holds are real seconds: the canary is watched by an activity."""


@dataclass
class ServiceWorld(World):
    balancer: WatchedBalancer = field(init=False)
    people: People = field(init=False)
    rules: RolloutConfig = field(default_factory=lambda: AT_ONCE)
    """Of the versions that a test gives none."""
    inputs: dict[str, ServiceInput] = field(default_factory=dict)
    _numbers: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.balancer = WatchedBalancer(fleet=self.fleet)
        self.balancers["cloud_1"] = self.balancer
        self.people = People(self.fleet, self.db, self.balancer)
        self.fleet.balancer = self.balancer
        self.fleet.on_power_off = self.balancer.power_off

    # -- asking for things, as the API does

    async def new_service(self) -> str:
        """Its row; the first deploy starts its workflow."""
        service_id, now = new_id("svc"), utcnow()
        arg = ServiceInput(
            service_id=service_id,
            name=f"s-{service_id[-10:]}",
            project_id="prj_1",
            project="default",
            cloud_id="cloud_1",
            cloud="fake",
            created_by="ann",
            created_at=now,
            limits=self.limits,
        )
        service = Service(
            id=service_id,
            name=arg.name,
            project=arg.project,
            cloud=arg.cloud,
            state=ServiceState.STARTING,
            created_by="ann",
            created_at=now,
            state_since=now,
        )
        async with self.db.begin() as conn:
            assert await insert_service(conn, service, arg, [])
        self.inputs[service_id] = arg
        self.ids.append(service_id)
        return service_id

    async def reopen(self, service_id: str) -> int:
        """A terminated service is to start again; the next deploy's ``life``."""
        async with self.db.begin() as conn:
            row = await lock_service(conn, service_id)
            assert row is not None
            row = await reopen_service(conn, row, utcnow())
        self.inputs[service_id] = row.input
        return row.told_revision

    def version(self, service_id: str, plan: ServePlan | None = None, **spec: Any) -> VersionSpec:
        """The next version of the service; ``plan``: what becomes of it."""
        self._numbers[service_id] += 1
        number = self._numbers[service_id]
        values: dict[str, Any] = {
            "id": new_id("sv"),
            "name": f"v{number}",
            "number": number,
            "compute_config": ComputeConfig(),
            "probes": {"default": ProbeConfig(path="/")},
            "rollout": self.rules,
            "created_by": "ann",
            "created_at": utcnow(),
        }
        found = VersionSpec(**(values | spec))
        if plan is not None:
            self.fleet.serve_plans[found.id] = plan
        return found

    async def accept_deploy(self, service_id: str, deploy: DeployRequest) -> None:
        """Its rows, as the API writes them before it tells the workflow."""
        config = ServiceConfig(applications=[ApplicationConfig(import_path="main:app")])
        async with self.db.begin() as conn:
            for spec in deploy.versions:
                version = ServiceVersion(
                    id=spec.id,
                    service_id=service_id,
                    name=spec.name,
                    number=spec.number,
                    state=ServiceVersionState.STARTING,
                    config=config,
                    created_by=spec.created_by,
                    created_at=spec.created_at,
                    state_since=spec.created_at,
                )
                await insert_version(conn, "prj_1", deploy.id, spec, version, None)
            await insert_deploy(conn, "prj_1", service_id, deploy)

    def request(self, *versions: VersionSpec, **more: Any) -> DeployRequest:
        return DeployRequest(**({"id": new_id("dp"), "actor": "user:ann", "versions": list(versions)} | more))

    async def send(self, service_id: str, deploy: DeployRequest) -> None:
        await deploy_service(self.client, self.settings.task_queue, self.inputs[service_id], deploy)

    async def deploy(self, service_id: str, *versions: VersionSpec, **request: Any) -> DeployRequest:
        """One deploy: rows, then the signal. The first one of a service carries its tokens."""
        if not await self._deploys(service_id):
            request = {"gate": TOKENS} | request
        deploy = self.request(*versions, **request)
        await self.accept_deploy(service_id, deploy)
        await self.send(service_id, deploy)
        return deploy

    async def _deploys(self, service_id: str) -> int:
        async with self.db.read() as conn:
            rows = await conn.execute(
                select(service_deploys.c.id).where(service_deploys.c.service_id == service_id).limit(1)
            )
            return len(rows.all())

    async def running_service(self, plan: ServePlan | None = None, **spec: Any) -> tuple[str, VersionSpec]:
        """A service whose first version has all the traffic, and that version."""
        service_id = await self.new_service()
        version = self.version(service_id, plan, **spec)
        await self.deploy(service_id, version)
        await self.until_finished(service_id, version)
        return service_id, version

    async def order(self, service_id: str, action: RolloutAction, percent: int | None = None) -> None:
        await self.update(service_id, "rollout", RolloutOrder(actor="user:ann", action=action, percent=percent))

    async def rollback(self, service_id: str) -> None:
        await self.update(service_id, "rollback", RollbackOrder(actor="user:ann", reason="it is slow"))

    async def kill_machine(self, node: Node) -> None:
        self.balancer.forgiven.add(node.cluster_id)
        await super().kill_machine(node)

    async def lose_head(self, cluster_id: str) -> None:
        """The head's machine loses its power, and the monitor says that it is silent."""
        head = await self.node(cluster_id)
        await self.until_machine_known(cluster_id, head.id)
        await self.kill_machine(head)
        silence = HeadSilent(
            event_id=f"{head.id}/silent", node_id=head.id, since=utcnow() - timedelta(seconds=30), silent_s=30
        )
        await self.handle(cluster_id).signal("head_silent", silence)

    async def terminate(self, id: str, reason: str = "enough") -> None:
        self.balancer.forgiven.add(id)
        await super().terminate(id, reason)

    async def skip(self, id: str, seconds: float) -> None:
        if id in self.inputs:
            self.people.ahead += timedelta(seconds=seconds)
        await super().skip(id, seconds)

    # -- looking

    async def service(self, service_id: str) -> Service:
        """As the records have it."""
        row = await load_service(self.db, service_id)
        assert row is not None
        async with self.db.read() as conn:
            versions = [v.version for v in await versions_of(conn, service_id)]
        return row.service.model_copy(update={"versions": versions[::-1]})

    async def version_of(self, service_id: str, version: VersionSpec) -> ServiceVersion:
        (found,) = [v for v in (await self.service(service_id)).versions if v.id == version.id]
        return found

    async def until_service(
        self, service_id: str, what: str, look: Callable[[Service], bool], timeout_s: float = WAIT_S
    ) -> Service:
        """The records say so of the service."""
        last: list[Service] = []

        async def seen() -> bool:
            last[:] = [await self.service(service_id)]
            return look(last[0])

        try:
            await self.until(seen, f"{service_id}: {what}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; {tell(last[0])}; {self.balancer.shares(service_id)}") from None
        return last[0]

    async def until_state(self, service_id: str, state: ServiceState, timeout_s: float = WAIT_S) -> Service:
        return await self.until_service(service_id, state, lambda s: s.state == state, timeout_s)

    async def until_was(self, service_id: str, state: ServiceState) -> None:
        """It is, or has been, in this state, which may last for moments."""

        async def look() -> bool:
            return any(e.kind == "state" and e.message.startswith(f"{state}:") for e in await self.story(service_id))

        await self.until(look, f"{service_id} to be {state}, if only for a moment")

    async def until_version(
        self, service_id: str, version: VersionSpec, state: ServiceVersionState, timeout_s: float = WAIT_S
    ) -> ServiceVersion:
        await self.until_service(
            service_id,
            f"{version.name} {state}",
            lambda s: any(v.id == version.id and v.state == state for v in s.versions),
            timeout_s,
        )
        return await self.version_of(service_id, version)

    async def until_finished(self, service_id: str, version: VersionSpec, timeout_s: float = WAIT_S) -> Service:
        """The service runs with nothing under way and this version has all the traffic, in the records and in the load
        balancer."""

        def look(s: Service) -> bool:
            return (
                s.state == ServiceState.RUNNING
                and s.primary_version == version.id
                and s.rollout is None
                and {v.id: v.weight for v in s.versions if v.weight} == {version.id: 100}
                and self.balancer.shares(service_id) == {version.id: 100}
            )

        return await self.until_service(service_id, f"{version.name} to have it all", look, timeout_s)

    async def until_share(self, service_id: str, version: VersionSpec, percent: float) -> None:
        async def look() -> bool:
            return self.balancer.shares(service_id).get(version.id, 0) == percent

        try:
            await self.until(look, f"{version.name} to have {percent} %")
        except AssertionError as error:
            raise AssertionError(f"{error}; {tell(await self.service(service_id))}") from None

    async def clusters_of(self, service_id: str) -> dict[str, ClusterState]:
        """All that were ever made for it, by id, in the order of their making."""
        async with self.db.read() as conn:
            rows = await conn.execute(
                select(clusters.c.id, clusters.c.state)
                .where(clusters.c.service_id == service_id)
                .order_by(clusters.c.created_at, clusters.c.id)
            )
            return {r.id: ClusterState(r.state) for r in rows}

    def heads_of(self, version: VersionSpec) -> list[FakeAgent]:
        """Heads on which it was deployed last."""
        return [h for h in self.fleet.heads.values() if h.serve.status.version_id == version.id]

    async def until_released(self, service_id: str, version: VersionSpec) -> None:
        """The version has ended, and its clusters with it."""
        await self.until_version(service_id, version, ServiceVersionState.TERMINATED)

        async def look() -> bool:
            states = await self.clusters_of(service_id)
            return all(states[i] == ClusterState.TERMINATED for i in self.fleet.deployed[version.id])

        await self.until(look, f"the clusters of {version.name} to be released")

    async def nothing_left(self, service_id: str, timeout_s: float = WAIT_S) -> None:
        """It is TERMINATED in the records, its workflow has ended; no cluster, no machine, no endpoint is left."""
        await self.until_state(service_id, ServiceState.TERMINATED, timeout_s)
        await self.until_ended(service_id, timeout_s)
        for id in await self.clusters_of(service_id):
            await self.until_cluster(id, ClusterState.TERMINATED, timeout_s)
        await self.until_gone()
        assert self.balancer.url_of(service_id) is None
        assert all(v.state == ServiceVersionState.TERMINATED for v in (await self.service(service_id)).versions)


def tell(service: Service) -> str:
    """What a failing test shows."""
    versions = ", ".join(
        f"{v.name} {v.state} {v.weight} % ({v.reason}) "
        f"{[(c.state, c.ready, c.message) for c in v.clusters]} "
        f"{[(c.type, c.message) for c in v.checklist if not c.status]}"
        for v in service.versions
    )
    return f"it is {service.state}: {service.reason}; {service.waits_for}; {service.rollout}; {versions}"


@asynccontextmanager
async def make_service_world(
    client: Client, folder: Path, *, interceptors: Sequence[Interceptor] = (), **more: Any
) -> AsyncIterator[ServiceWorld]:
    """As ``make_world``; fails also when the load balancer was told what would have cost somebody a request."""
    async with make_world(client, folder, interceptors=interceptors, kind=ServiceWorld, **more) as world:
        assert isinstance(world, ServiceWorld)
        living = asyncio.create_task(world.people.live())
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(canaries, "POLL_S", LOOK_S)  # people here send in a second what others do in a minute
                yield world
            assert not world.balancer.wrongs, world.balancer.wrongs
            assert not living.done() or living.result() is None
        finally:
            living.cancel()
            await asyncio.gather(living, return_exceptions=True)
