"""The monitor: one loop for all clusters, in one activity that never ends and writes no history."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta

import structlog
from sqlalchemy import func, select
from temporalio import activity
from temporalio.client import Client, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.service import RPCError, RPCStatusCode

from activities.monitor.endpoints import EndpointWatch
from heliostat.models.clusters import ClusterState
from heliostat.models.common import utcnow
from heliostat.models.services import ServiceState
from runtime.messages.clusters import ClusterHandle, HeadSilent, start_cluster
from runtime.messages.common import reached
from runtime.messages.jobs import start_job
from runtime.messages.services import GateOrder, ServiceHandle, deploy_service
from runtime.settings import Settings
from runtime.telemetry import CLUSTERS
from store import heartbeats, outbox
from store.database import Database
from store.services import rows as services
from store.services import tokens as token_records
from store.tables import clusters

log = structlog.get_logger(__name__)

UNSTARTED_AFTER_S = 10.0
"""The API starts a workflow within milliseconds of accepting; one that is not there by now lost its API."""

ENDPOINTS_S = 10.0
"""Between two looks at the endpoints. A load balancer that was killed is back after this, for nobody else starts it;
its counters are scraped by Prometheus every 15 s by habit."""

TELL_TRIES = 5
"""Changes of a service's tokens that may come while we tell the one before."""

MASS_SHARE = 0.5
MASS_MIN = 3
"""More than this share of all heads silent at once, and at least so many: our ears are at fault, or a whole
network. An alarm, not a mass replacement: only those whose cloud says that their machine is gone count as lost."""


class MonitorActivities:
    def __init__(
        self,
        db: Database,
        client: Client,
        settings: Settings,
        endpoints: EndpointWatch | None = None,
    ) -> None:
        self._endpoints = endpoints
        self._looked_at = -ENDPOINTS_S
        self._look: asyncio.Task[None] | None = None
        self._db = db
        self._client = client
        self._settings = settings
        self._told: dict[str, datetime] = {}
        self._alarm = False

    @activity.defn
    async def watch(self) -> None:
        """Runs until the worker stops; the heartbeat moves it to another worker when this one dies. A failure of
        one round (records or Temporal away) ends this attempt, and the retry begins a new one."""
        try:
            while not activity.is_worker_shutdown():
                activity.heartbeat()
                await self.round(utcnow())
                try:
                    await asyncio.wait_for(activity.wait_for_worker_shutdown(), self._settings.monitor_interval_s)
                except TimeoutError:
                    continue
        finally:
            CLUSTERS.clear()  # whoever watches next counts them: two workers must not both
            self._stop_looking()

    async def round(self, now: datetime) -> None:
        """One look at everything; ``now`` is the records' time."""
        await self._start_forgotten()
        await self._tell_gates()
        await self._find_silent(now)
        await self._count()
        self._look_at_endpoints()

    async def _start_forgotten(self) -> None:
        cluster_rows, job_rows = await outbox.unstarted(self._db, UNSTARTED_AFTER_S)
        for cluster in cluster_rows:
            log.warning("starting an accepted cluster that nobody started", cluster=cluster.id)
            await start_cluster(self._client, self._settings.task_queue, cluster.input)
            await outbox.mark_started(self._db, "cluster", cluster.id)
        for service, deploy in await services.unstarted_deploys(self._db, UNSTARTED_AFTER_S):
            log.warning("giving its service a deploy that nobody gave it", service=service.service_id, deploy=deploy.id)
            # Its workflow says that it has it (``claim_deploy``): a second signal changes nothing.
            await deploy_service(self._client, self._settings.task_queue, service, deploy)
        for job in job_rows:
            log.warning("starting an accepted job that nobody started", job=job.id)
            await start_job(self._client, self._settings.task_queue, job.input)
            await outbox.mark_started(self._db, "job", job.id)

    async def _tell_gates(self) -> None:
        """Tokens that were changed by an API that died before it could say so."""
        for service_id in await token_records.untold_gates(self._db):
            for _ in range(TELL_TRIES):
                if not await self._tell_gate(service_id):
                    break

    async def _tell_gate(self, service_id: str) -> bool:
        """Whether the tokens were changed while we told them: an API may have told newer ones meanwhile, and ours, if
        they arrived last, are to be replaced by those again (``api/services/tokens.py``)."""
        row = await services.load_service(self._db, service_id)
        if row is None or row.withdrawn or row.state == ServiceState.TERMINATED:
            return False
        # They carry the tokens of when they were accepted, and would undo ours if they came later.
        for service, deploy in await services.unstarted_deploys(self._db, 0, service_id):
            await deploy_service(self._client, self._settings.task_queue, service, deploy)
        try:
            order = GateOrder(actor="monitor", gate=row.gate)
            await ServiceHandle(self._client, service_id).set_gate(order, timeout_s=10)
        except (WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
            log.warning("tokens not told yet", service=service_id, why=str(error.cause or error))
            return False
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False  # it does not run: its next deploy brings the tokens
        await token_records.gate_told(self._db, service_id, row.gate)
        after = await services.load_service(self._db, service_id)
        return after is not None and after.gate != row.gate

    async def _find_silent(self, now: datetime) -> None:
        found = await heartbeats.silent_heads(self._db, now, self._settings.silence_s)
        mass = len(found.silent) >= MASS_MIN and len(found.silent) > MASS_SHARE * found.total
        if mass and not self._alarm:
            log.error(
                "mass silence: only heads whose machine is gone are replaced while it lasts; look at the network "
                "between nodes and API",
                silent=len(found.silent),
                total=found.total,
            )
        self._alarm = mass
        again = timedelta(seconds=self._settings.silence_s)
        # One that boots is no sign of a deaf control plane: it does not count towards a mass silence.
        silent = found.silent + await heartbeats.unheard_heads(self._db, now, self._settings.silence_s)
        self._told = {node: at for node, at in self._told.items() if any(node == n for _, n, _ in silent)}
        for cluster_id, node_id, since in silent:
            last = self._told.get(node_id)
            if last is not None and now - last < again:
                continue
            self._told[node_id] = now
            log.warning("head silent", cluster=cluster_id, node=node_id, since=since.isoformat())
            message = HeadSilent(
                event_id=f"{node_id}/silent/{now.isoformat()}",
                node_id=node_id,
                since=since,
                silent_s=(now - since).total_seconds(),
                mass=mass,
            )
            await reached(ClusterHandle(self._client, cluster_id).head_silent(message))

    def _look_at_endpoints(self) -> None:
        """Beside the rounds: no endpoint may keep us from hearing that a head is silent."""
        if self._endpoints is None:
            return
        if self._look is not None and self._look.done():
            self._look.result()  # what it could not do ends this attempt, as a round's failure does
            self._look = None
        if self._look is None and time.monotonic() - self._looked_at >= ENDPOINTS_S:
            self._looked_at = time.monotonic()
            self._look = asyncio.create_task(self._endpoints.look())

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if self._endpoints is not None:
            self._endpoints.close()

    async def _count(self) -> None:
        async with self._db.read() as conn:
            rows = await conn.execute(
                select(clusters.c.state, func.count()).where(clusters.c.ended_at.is_(None)).group_by(clusters.c.state)
            )
            counts = {str(state): int(number) for state, number in rows}
        for state in ClusterState:
            if not state.settled:
                CLUSTERS.labels(state=state).set(counts.get(state, 0))
