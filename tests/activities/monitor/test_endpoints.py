"""The monitor's look after endpoints: each is mended by itself, and a lost one is told to its workflow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import select, update
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from activities.monitor import endpoints as endpoint_watch
from activities.monitor.endpoints import EndpointWatch
from activities.monitor.loop import MonitorActivities
from clouds.contract.balancer import Backend, Endpoint, EndpointSpec
from clouds.contract.errors import BadConfig
from clouds.fake.balancer import FakeBalancer
from heliostat.models.common import new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import Service, ServiceConfig, ServiceState, ServiceVersion, ServiceVersionState
from runtime.messages.services import EndpointLost, EndpointTrouble, ServiceInput, VersionSpec
from runtime.settings import Settings
from store.database import Database, migrate
from store.services.deploys import insert_service, insert_version
from store.tables import clouds, organizations, projects, services

BACKENDS = [Backend(id="cl_a", version_id="sv_1", http="10.0.0.1:8000", weight=100)]


@dataclass
class Signals:
    """A client whose workflows only note what they are told."""

    told: list[tuple[str, EndpointLost]] = field(default_factory=list)
    troubles: list[tuple[str, str]] = field(default_factory=list)
    answer: RPCStatusCode | None = None
    """Fails with it."""

    def get_workflow_handle(self, id: str) -> Any:
        @dataclass
        class Handle:
            async def signal(_, name: str, message: EndpointLost | EndpointTrouble, **__: Any) -> None:
                if self.answer is not None:
                    raise RPCError("no", self.answer, b"")
                if isinstance(message, EndpointLost):
                    assert name == "endpoint_lost"
                    self.told.append((id, message))
                else:
                    assert name == "endpoint_trouble"
                    self.troubles.append((id, message.trouble))

        return Handle()


@dataclass
class Balancer(FakeBalancer):
    refused: set[str] = field(default_factory=set)
    bugs: set[str] = field(default_factory=set)
    holding: threading.Event = field(default_factory=threading.Event)
    """The first ``ensure`` of a mending waits for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.holding.set()
        self._waited = False

    def ensure(self, spec: EndpointSpec, *, make: bool = True) -> Endpoint:
        if spec.service_id in self.bugs:
            raise KeyError("a bug of ours")
        if spec.service_id in self.refused:
            raise BadConfig("its port is taken")
        if not make and not self._waited and not self.holding.is_set():
            self._waited = True
            assert self.holding.wait(20)
        return super().ensure(spec, make=make)


@dataclass
class World:
    db: Database
    balancer: Balancer
    signals: Signals
    watch: EndpointWatch

    async def service(self, *, grpc: bool = False, **fields: Any) -> str:
        """A living one with its endpoint; its id."""
        id, now = new_id("svc"), utcnow()
        common: dict[str, Any] = {"created_by": "ann", "created_at": now}
        service = Service.model_validate(
            {"id": id, "name": f"chat-{id[-6:]}", "project": "default", "cloud": "local", "state": ServiceState.RUNNING,
             "state_since": now, "query_url": f"http://x/{id}"} | common | fields
        )  # fmt: skip
        arg = ServiceInput(
            service_id=id, name=service.name, project_id="prj_1", project="default", cloud_id="cloud_1", cloud="local",
            **common,
        )  # fmt: skip
        version_id = new_id("sv")
        spec = VersionSpec(id=version_id, name="v1", number=1, compute_config=ComputeConfig(), grpc=grpc, **common)
        config = ServiceConfig(name=service.name, applications=[{"import_path": "main:app"}])
        version = ServiceVersion(
            id=version_id, service_id=id, name="v1", number=1, state=ServiceVersionState.RUNNING, config=config,
            state_since=now, **common,
        )  # fmt: skip
        async with self.db.begin() as conn:
            assert await insert_service(conn, service, arg, [])
            await insert_version(conn, "prj_1", new_id("dp"), spec, version, None)
        self.balancer.ensure(EndpointSpec(service_id=id, service_name=service.name, installation_id="inst_1"))
        self.balancer.set_backends(id, 1, BACKENDS)
        return id

    async def look(self) -> None:
        await self.watch.poll()
        await self.watch.wait_for_repairs()

    def state(self, service_id: str) -> str | None:
        found = self.balancer.describe(service_id)
        return None if found is None else found.state


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
    await migrate(url)
    db, balancer, signals = Database(url), Balancer(), Signals()
    now = utcnow()
    async with db.begin() as conn:
        await conn.execute(organizations.insert().values(id="org_1", name="default", created_at=now))
        await conn.execute(
            projects.insert().values(id="prj_1", organization_id="org_1", name="default", created_at=now)
        )
        cloud = {"provider": "fake", "is_default": True, "capabilities": {}, "created_at": now}
        await conn.execute(clouds.insert().values(id="cloud_1", organization_id="org_1", name="local", **cloud))
    watch = EndpointWatch(db, cast(Client, signals), {"cloud_1": balancer}, "inst_1")
    yield World(db, balancer, signals, watch)
    watch.close()
    await db.dispose()


async def test_what_does_not_run_is_started_and_what_is_well_is_left_alone(world: World) -> None:
    well, broken = await world.service(), await world.service(grpc=True)
    world.balancer.damage(broken, "its supervisor does not run")
    before = world.balancer.calls["ensure"]
    await world.look()
    assert [world.state(s) for s in (well, broken)] == ["ready", "ready"]
    assert world.balancer.calls["ensure"] - before == 1
    assert world.balancer._endpoints[broken].spec.grpc, "by what its versions speak"
    assert world.balancer.request(broken).status == 200
    assert world.signals.told == []
    await world.look()
    assert world.balancer.calls["ensure"] - before == 1


async def test_one_that_cannot_be_mended_is_tried_again_and_no_other_waits_for_it(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    refused, buggy, broken = [await world.service() for _ in range(3)]
    for service in (refused, buggy, broken):
        world.balancer.damage(service, "it does not run")
    world.balancer.refused, world.balancer.bugs = {refused}, {buggy}
    for _ in range(3):
        await world.look()
    assert [world.state(s) for s in (refused, buggy, broken)] == ["it does not run", "it does not run", "ready"]
    said = capsys.readouterr().out
    assert said.count("tried again: its port is taken") == 1, "once, not at every look"
    assert "a bug of ours" in said
    world.balancer.refused, world.balancer.bugs = set(), set()
    await world.look()
    assert [world.state(s) for s in (refused, buggy, broken)] == ["ready", "ready", "ready"]


async def test_a_look_does_not_wait_for_what_is_being_mended(world: World) -> None:
    slow, other = await world.service(), await world.service()
    world.balancer.damage(slow, "it does not run")
    world.balancer.holding.clear()
    await world.watch.poll()
    world.balancer.damage(other, "it does not run")
    try:
        async with asyncio.timeout(20):
            while world.state(other) != "ready":
                await world.watch.poll()
                await asyncio.sleep(0.01)
        assert world.state(slow) == "it does not run"
    finally:
        world.balancer.holding.set()
    await world.watch.wait_for_repairs()
    assert world.state(slow) == "ready"


async def test_what_cannot_even_be_asked_is_mended(world: World) -> None:
    service, other = await world.service(), await world.service()
    world.balancer.damage(other, "it does not run")
    world.balancer.fail(2, "describe")
    before = world.balancer.calls["ensure"]
    await world.look()
    assert world.balancer.calls["ensure"] - before == 2
    assert [world.state(s) for s in (service, other)] == ["ready", "ready"]


@pytest.mark.parametrize("how", ["gone", "its backends are lost"])
async def test_a_lost_one_is_told_to_its_workflow(world: World, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = await world.service()
    if how == "gone":
        world.balancer.remove(service)
    else:
        world.balancer.lose_backends(service)
    world.signals.answer = RPCStatusCode.UNAVAILABLE
    await world.look()
    world.signals.answer = RPCStatusCode.NOT_FOUND
    await world.look()
    world.signals.answer = None
    for _ in range(3):
        await world.look()
    ((told, message),) = world.signals.told
    assert told == service
    assert ("no longer exists" if how == "gone" else "lost its backends") in message.reason
    monkeypatch.setattr(endpoint_watch, "LOST_AGAIN_S", 0.0)
    await world.look()
    assert len({m.event_id for _, m in world.signals.told}) == 2, "told again, when it is lost still"
    assert (world.state(service) is None) == (how == "gone"), "to make it is the workflow's"
    if how == "gone":
        world.balancer.ensure(EndpointSpec(service_id=service, service_name="chat", installation_id="inst_1"))
    world.balancer.set_backends(service, 2, BACKENDS)
    await world.look()
    assert len(world.signals.told) == 2


@pytest.mark.parametrize(
    "fields", [{"query_url": None}, {"state": ServiceState.TERMINATING}, {"state": ServiceState.TERMINATED}]
)
async def test_what_should_have_none_is_not_missed(world: World, fields: dict[str, Any]) -> None:
    """Its workflow is about to make it, or has removed it."""
    service = await world.service(**fields)
    world.balancer.remove(service)
    if fields.get("state") == ServiceState.TERMINATED:
        async with world.db.begin() as conn:
            await conn.execute(services.update().where(services.c.id == service).values(ended_at=utcnow()))
    await world.look()
    assert world.signals.told == []
    assert world.state(service) is None


async def test_one_that_is_removed_meanwhile_does_not_come_to_be_again(world: World) -> None:
    service = await world.service()
    world.balancer.damage(service, "it does not run")
    world.balancer.holding.clear()
    await world.watch.poll()
    world.balancer.remove(service)
    world.balancer.holding.set()
    await world.watch.wait_for_repairs()
    assert world.state(service) is None


async def test_counters_are_served_until_the_service_has_ended(world: World) -> None:
    service = await world.service()
    world.balancer.request(service)

    def counted() -> float | None:
        labels = {"service_id": service, "service": f"chat-{service[-6:]}", "project": "default", "version": "sv_1"}
        return REGISTRY.get_sample_value(
            "heliostat_endpoint_requests_total", labels | {"cluster": "cl_a", "code": "200"}
        )

    await world.look()
    assert counted() == 1
    async with world.db.begin() as conn:
        await conn.execute(services.update().where(services.c.id == service).values(ended_at=utcnow()))
    await world.look()
    assert counted() is None


async def test_the_monitor_looks_every_few_seconds_beside_its_rounds(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await world.service()
    monitor = MonitorActivities(world.db, cast(Client, world.signals), Settings(home=tmp_path), world.watch)

    async def until_mended() -> None:
        async with asyncio.timeout(20):
            while world.state(service) != "ready":
                await asyncio.sleep(0.01)
                await monitor.round(utcnow())

    world.balancer.damage(service, "it does not run")
    await until_mended()
    looks = world.balancer.calls["counters"]
    for _ in range(5):
        await monitor.round(utcnow())
        await asyncio.sleep(0)
    assert world.balancer.calls["counters"] == looks, "not in every round"
    monkeypatch.setattr("activities.monitor.loop.ENDPOINTS_S", 0.0)
    world.balancer.damage(service, "it does not run")
    await until_mended()
    monitor._stop_polling()


async def test_what_cannot_be_mended_is_told_once_and_taken_back(world: World) -> None:
    service_id = await world.service()
    world.balancer.damage(service_id, "it does not run")
    world.balancer.refused = {service_id}
    await world.look()
    (told,) = world.signals.troubles
    assert told == (service_id, "its port is taken")
    async with world.db.begin() as conn:  # as its workflow does when it has heard of it
        doc = (await conn.execute(select(services.c.doc).where(services.c.id == service_id))).scalar_one()
        await conn.execute(
            update(services).where(services.c.id == service_id).values(doc={**doc, "endpoint_trouble": told[1]})
        )
    await world.look()
    assert len(world.signals.troubles) == 1
    world.balancer.refused = set()
    await world.look()  # mends it
    await world.look()
    assert world.signals.troubles == [told, (service_id, "")]
