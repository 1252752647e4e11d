"""The monitor tells workflows of tokens that an API which died has not told: never older ones for good."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from temporalio.client import Client
from temporalio.testing import ActivityEnvironment

from activities.monitor.loop import MonitorActivities
from heliostat.models.common import new_id, utcnow
from heliostat.models.services import Service, ServiceState
from runtime.messages.services import DeployRequest, GateOrder, GateTokens, ServiceInput
from runtime.settings import Settings
from store.database import Database, migrate
from store.services import tokens as token_records
from store.services.deploys import insert_deploy, insert_service
from store.services.rows import StoredToken
from store.tables import clouds, organizations, projects

NOW = utcnow()


@dataclass
class Workflow:
    """A client with one service's workflow, which goes by the tokens that it was told last."""

    gate: GateTokens = field(default_factory=GateTokens)
    meanwhile: Callable[[], Awaitable[None]] | None = None
    """What happens while the next update is on its way."""
    seen: set[str] = field(default_factory=set)

    def get_workflow_handle(self, _: str) -> Workflow:
        return self

    async def execute_update(self, name: str, order: GateOrder, **_: Any) -> None:
        assert name == "set_gate"
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        self.gate = order.gate

    async def start_workflow(self, *_: Any, start_signal_args: list[DeployRequest], **__: Any) -> None:
        (deploy,) = start_signal_args
        if deploy.id not in self.seen and deploy.gate is not None:
            self.seen.add(deploy.id)
            self.gate = deploy.gate


def token(id: str, **more: Any) -> StoredToken:
    return StoredToken(id=id, created_at=NOW, sha256=f"sha-{id}", **more)


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
    await migrate(url)
    db = Database(url)
    async with db.begin() as conn:
        await conn.execute(organizations.insert().values(id="org_1", name="default", created_at=NOW))
        await conn.execute(projects.insert().values(id="prj_1", organization_id="org_1", name="p", created_at=NOW))
        cloud = {"provider": "fake", "is_default": True, "capabilities": {}, "created_at": NOW}
        await conn.execute(clouds.insert().values(id="cloud_1", organization_id="org_1", name="local", **cloud))
    yield db
    await db.dispose()


async def put_service(db: Database, *tokens: StoredToken) -> ServiceInput:
    common: dict[str, Any] = {"name": "chat", "project": "p", "cloud": "local", "created_by": "ann", "created_at": NOW}
    arg = ServiceInput(service_id="svc_1", project_id="prj_1", cloud_id="cloud_1", **common)
    service = Service(id="svc_1", state=ServiceState.RUNNING, state_since=NOW, **common)
    async with db.begin() as conn:
        assert await insert_service(conn, service, arg, list(tokens))
    return arg


async def write(db: Database, *tokens: StoredToken) -> None:
    async with db.begin() as conn:
        await token_records.write_tokens(conn, "svc_1", list(tokens))


def monitor(db: Database, workflow: Workflow) -> MonitorActivities:
    return MonitorActivities(db, cast(Client, workflow), Settings())


async def test_a_token_that_is_deleted_while_older_ones_are_told_stays_deleted(db: Database) -> None:
    """An API adds one and deletes the other while the monitor's word of the first change is on its way: it arrives
    last, and nobody would ever have told the workflow anything else."""
    workflow = Workflow()
    await put_service(db, token("a", told=True), token("b"))

    async def the_api_deletes_a() -> None:
        await write(db, token("a", told=True, deleted=True), token("b", told=True))
        workflow.gate = GateTokens(hashes=["sha-b"])
        await token_records.acknowledge_tokens(db, "svc_1", workflow.gate)

    workflow.meanwhile = the_api_deletes_a
    await ActivityEnvironment().run(monitor(db, workflow).round, utcnow())
    assert workflow.gate.hashes == ["sha-b"]
    assert await token_records.pending_tokens(db) == []


async def test_what_was_deployed_before_a_change_of_tokens_is_told_before_it(db: Database) -> None:
    """A deploy carries the tokens of when it was accepted, and may be on its way for as long as the monitor waits."""
    workflow = Workflow()
    arg = await put_service(db, token("a", told=True))
    deploy = DeployRequest(id=new_id("dp"), actor="ann", gate=GateTokens(hashes=["sha-a"]))
    async with db.begin() as conn:
        await insert_deploy(conn, "prj_1", arg.service_id, deploy)
    await write(db, token("a", told=True), token("b"))
    await ActivityEnvironment().run(monitor(db, workflow).round, utcnow())
    await workflow.start_workflow(start_signal_args=[deploy])  # the API's own call, which was slow
    assert workflow.gate.hashes == ["sha-a", "sha-b"]
