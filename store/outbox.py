"""The outbox: rows that a workflow may not know of yet are delivered to it, then marked. Accepted clusters, jobs and
deploys, and changed query tokens of services.

The rows are the truth, and each delivery can be repeated. So whoever finds a pending row delivers it: the API for a
request that it accepted earlier, the monitor for what an API that died has left. Both report failures in their own way:
the methods raise what the handles of ``runtime/messages`` raise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

import structlog
from temporalio.client import Client

from heliostat.models.services import ServiceState
from runtime.messages.clusters import ClusterInput, start_cluster
from runtime.messages.jobs import JobInput, start_job
from runtime.messages.services import DeployRequest, GateOrder, ServiceHandle, ServiceInput, deploy_service
from store.acceptance import Kind, confirm_started
from store.clusters import ClusterRow, unstarted_clusters
from store.database import Database
from store.jobs import JobRow, unstarted_jobs
from store.services.rows import load_service, unstarted_deploys
from store.services.tokens import acknowledge_tokens

log = structlog.get_logger(__name__)

TOKEN_TRIES = 5
"""Changes of a service's tokens that may arrive while an earlier one is delivered."""


@dataclass(frozen=True)
class Outbox:
    db: Database
    client: Client
    task_queue: str
    bound: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    """Around each start and deploy: the caller's time limit and errors. It bounds the call to Temporal alone: a write
    that waits for the database is not Temporal's fault."""

    async def start_cluster(self, arg: ClusterInput) -> None:
        async with self.bound():
            await start_cluster(self.client, self.task_queue, arg)
        await self._mark("cluster", arg.cluster_id)

    async def start_job(self, arg: JobInput) -> None:
        async with self.bound():
            await start_job(self.client, self.task_queue, arg)
        await self._mark("job", arg.job_id)

    async def deploy(self, arg: ServiceInput, request: DeployRequest) -> None:
        """Its workflow marks it when it takes it up (``claim_deploy``). If somebody terminates the workflow before, the
        next delivery starts another one; a second signal changes nothing."""
        async with self.bound():
            await deploy_service(self.client, self.task_queue, arg, request)

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

    async def deliver_deploys(self, service_id: str, *, mark: bool = False) -> None:
        """The pending ones of one service. Call it before any other message to the service, so that none overtakes
        them: a deploy carries the tokens of when it was accepted. ``mark``: by an API, whose next request then
        does not deliver it again; the monitor leaves that to the workflow."""
        for service, request in await unstarted_deploys(self.db, 0, service_id):
            await self.deploy(service, request)
            if mark:
                await self._mark("deploy", request.id)

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
    """Accepted clusters and jobs whose workflow is not known to exist."""
    return await unstarted_clusters(db, older_than_s), await unstarted_jobs(db, older_than_s)
