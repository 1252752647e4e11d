"""What is pending in the records reaches its workflow, and is marked; a cancelled row stays cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from temporalio.client import Client

from runtime.messages.services import DeployRequest, GateOrder
from store import outbox
from store.acceptance import cancel_accepted
from store.database import Database
from store.jobs import load_job, unstarted_jobs
from store.outbox import TOKEN_TRIES, Outbox
from store.revisions import is_cancelled
from store.services.rows import claim_deploy, load_service, unstarted_deploys
from store.services.tokens import pending_tokens, write_tokens
from tests.store.services.test_rows import a_token, put_deploy, put_service
from tests.store.test_revisions import a_cluster, a_job, put_cluster, put_job


@dataclass
class Temporal:
    """Notes what it is given. ``meanwhile``: what happens while an update is on its way."""

    started: list[str] = field(default_factory=list)
    gates: list[GateOrder] = field(default_factory=list)
    meanwhile: Any = None

    def get_workflow_handle(self, _: str) -> Temporal:
        return self

    async def start_workflow(self, name: str, _: Any, *, id: str, **more: Any) -> None:
        deploy: list[DeployRequest] = more.get("start_signal_args", [])
        self.started.append(" ".join([name, id, *(d.id for d in deploy)]))
        if self.meanwhile is not None:
            await self.meanwhile()

    async def execute_update(self, name: str, order: GateOrder, **_: Any) -> None:
        assert name == "set_gate"
        self.gates.append(order)
        if self.meanwhile is not None:
            await self.meanwhile()


def an_outbox(db: Database, temporal: Temporal) -> Outbox:
    return Outbox(db, cast(Client, temporal), "queue")


async def test_what_was_accepted_is_delivered_once(db: Database, project: str) -> None:
    await put_cluster(db, project, a_cluster())
    await put_job(db, project, a_job())
    await put_service(db, project, "svc_1")
    deploy, _ = await put_deploy(db, project)
    temporal = Temporal()
    await an_outbox(db, temporal).deliver_accepted(3600)
    assert temporal.started == []
    await an_outbox(db, temporal).deliver_accepted(0)
    assert temporal.started == ["ClusterWorkflow clu_1", f"ServiceWorkflow svc_1 {deploy}", "JobWorkflow job_1"]
    assert await outbox.unstarted(db, 0) == ([], [])
    await an_outbox(db, temporal).deliver_accepted(0)
    assert temporal.started[3:] == [f"ServiceWorkflow svc_1 {deploy}"], "until its workflow takes it up"
    assert await claim_deploy(db, deploy)
    assert await unstarted_deploys(db, 0) == []


async def test_only_the_call_to_temporal_is_bounded(db: Database, project: str) -> None:
    await put_job(db, project, a_job())
    inside = []

    @asynccontextmanager
    async def bound() -> AsyncIterator[None]:
        yield
        row = await load_job(db, "job_1")
        assert row is not None
        inside.append([job.id for job in await unstarted_jobs(db, 0)])

    temporal = Temporal()
    await Outbox(db, cast(Client, temporal), "queue", bound).deliver_accepted(0)
    assert inside == [["job_1"]], "it is marked after the bound call"
    assert await unstarted_jobs(db, 0) == []


async def test_a_row_that_is_cancelled_during_its_delivery_stays_cancelled(db: Database, project: str) -> None:
    await put_job(db, project, a_job())

    async def cancel() -> None:
        async with db.begin() as conn:
            assert await cancel_accepted(conn, "job", "job_1")

    await an_outbox(db, Temporal(meanwhile=cancel)).deliver_accepted(0)
    assert await is_cancelled(db, "job", "job_1")


async def test_tokens_are_delivered_after_the_deploys_before_them(db: Database, project: str) -> None:
    await put_service(db, project, "svc_1", a_token("qt_1"))
    deploy, _ = await put_deploy(db, project)
    temporal = Temporal()
    assert await an_outbox(db, temporal).deliver_tokens("svc_1", "user:ann", 1)
    assert temporal.started == [f"ServiceWorkflow svc_1 {deploy}"]
    assert [(o.actor, o.gate.hashes) for o in temporal.gates] == [("user:ann", ["sha-qt_1"])]
    assert await pending_tokens(db) == []
    assert await an_outbox(db, temporal).deliver_tokens("svc_1", "user:ann", 1)
    assert len(temporal.gates) == 1, "nothing is pending"


async def test_tokens_that_never_stop_changing_stay_pending(db: Database, project: str) -> None:
    await put_service(db, project, "svc_1", a_token("qt_0"))
    temporal = Temporal()

    async def another() -> None:
        async with db.begin() as conn:
            await write_tokens(conn, "svc_1", [a_token(f"qt_{len(temporal.gates)}")])

    temporal.meanwhile = another
    assert not await an_outbox(db, temporal).deliver_tokens("svc_1", "system", 1)
    assert len(temporal.gates) == TOKEN_TRIES
    row = await load_service(db, "svc_1")
    assert row is not None
    assert row.has_pending_tokens
