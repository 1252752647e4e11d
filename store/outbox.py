"""The outbox: rows that a workflow may not know of yet are delivered to it, then marked. Accepted clusters, jobs and
deploys, and changed query tokens of services.

The rows are the truth, and each delivery can be repeated. So whoever finds a pending row delivers it: the API for a
request that was made before, the monitor for what an API that died has left. Both report failures in their own way:
the methods raise what the handles of ``runtime/messages`` raise.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy import select
from temporalio.client import Client

from heliostat.models.common import utcnow
from heliostat.models.services import ServiceState
from runtime.messages.clusters import ClusterInput, start_cluster
from runtime.messages.jobs import JobInput, start_job
from runtime.messages.services import DeployRequest, GateOrder, ServiceHandle, ServiceInput, deploy_service
from store.acceptance import Kind, confirm_started
from store.clusters import ClusterRow, _cluster_row
from store.database import Database
from store.jobs import JobRow, _job_row
from store.revisions import _TABLES, takes_writes
from store.services.rows import load_service, unstarted_deploys
from store.services.tokens import acknowledge_tokens
from store.tables import clusters, jobs

log = structlog.get_logger(__name__)

TOKEN_TRIES = 5
"""Changes of a service's tokens that may be made while an earlier one is delivered."""


@dataclass(frozen=True)
class Outbox:
    db: Database
    client: Client
    task_queue: str

    async def start_cluster(self, arg: ClusterInput) -> None:
        await start_cluster(self.client, self.task_queue, arg)
        await self._mark("cluster", arg.cluster_id)

    async def start_job(self, arg: JobInput) -> None:
        await start_job(self.client, self.task_queue, arg)
        await self._mark("job", arg.job_id)

    async def deploy(self, arg: ServiceInput, request: DeployRequest) -> None:
        await deploy_service(self.client, self.task_queue, arg, request)
        await self._mark("deploy", request.id)

    async def deliver_accepted(self, older_than_s: float) -> None:
        """All that is pending, but for tokens. ``older_than_s`` leaves to the API what it is about to start itself."""
        pending_clusters, pending_jobs = await unstarted(self.db, older_than_s)
        for cluster in pending_clusters:
            log.warning("an accepted cluster has no workflow: starting it", cluster=cluster.id)
            await self.start_cluster(cluster.input)
        for service, request in await unstarted_deploys(self.db, older_than_s):
            log.warning("an accepted deploy is pending: delivering it", service=service.service_id, deploy=request.id)
            await self.deploy(service, request)
        for job in pending_jobs:
            log.warning("an accepted job has no workflow: starting it", job=job.id)
            await self.start_job(job.input)

    async def deliver_deploys(self, service_id: str) -> None:
        """The pending ones of one service. Call it before any other message to the service, so that none overtakes
        them: a deploy carries the tokens of when it was accepted."""
        for service, request in await unstarted_deploys(self.db, 0, service_id):
            await self.deploy(service, request)

    async def deliver_tokens(self, service_id: str, actor: str, timeout_s: float) -> bool:
        """Makes the service's workflow use the tokens of its row. A terminated service gets them with its next deploy.

        Several processes may deliver at once, and the one with older tokens may be the last: so each reads the row
        again after its delivery. False: the tokens changed during every try, and are still pending.
        """
        for turn in range(TOKEN_TRIES):
            row = await load_service(self.db, service_id)
            if row is None or row.withdrawn or row.state == ServiceState.TERMINATED:
                return True
            if turn == 0 and not row.has_pending_tokens:
                return True
            await self.deliver_deploys(service_id)
            order = GateOrder(actor=actor, gate=row.gate)
            await ServiceHandle(self.client, service_id).set_gate(order, timeout_s=timeout_s)
            await acknowledge_tokens(self.db, service_id, row.gate)
            after = await load_service(self.db, service_id)
            if after is None or after.gate == row.gate:
                return True
        return False

    async def _mark(self, kind: Kind, id: str) -> None:
        """A row that was cancelled meanwhile stays so: its workflow finds it cancelled and does nothing."""
        async with self.db.begin() as conn:
            await confirm_started(conn, kind, id)


async def unstarted(db: Database, older_than_s: float) -> tuple[list[ClusterRow], list[JobRow]]:
    """Accepted clusters and jobs whose workflow is not known to exist, oldest first."""
    before = utcnow() - timedelta(seconds=older_than_s)
    async with db.read() as conn:
        cluster_rows = await conn.execute(
            select(clusters)
            .where(clusters.c.started.is_(False), clusters.c.withdrawn.is_(False), clusters.c.created_at <= before)
            .order_by(clusters.c.id)
            .limit(1000)
        )
        job_rows = await conn.execute(
            select(jobs)
            .where(jobs.c.started.is_(False), jobs.c.withdrawn.is_(False), jobs.c.created_at <= before)
            .order_by(jobs.c.id)
            .limit(1000)
        )
        return [_cluster_row(r) for r in cluster_rows], [_job_row(r) for r in job_rows]


async def is_cancelled(db: Database, kind: str, id: str) -> bool:
    """The row was cancelled, or there is none. ``kind``: ``cluster``, ``job`` or ``service``."""
    async with db.read() as conn:
        return not await takes_writes(conn, _TABLES[kind], id)
