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
from runtime.messages.clusters import ClusterHandle, HeadSilent
from runtime.messages.common import SYSTEM, reached
from runtime.settings import Settings
from runtime.telemetry import CLUSTERS
from store import heartbeats
from store.database import Database
from store.outbox import Outbox
from store.services.tokens import pending_tokens
from store.tables import clusters

log = structlog.get_logger(__name__)

PENDING_AFTER_S = 10.0
"""The API starts a workflow within milliseconds of accepting; what is pending for so long has lost its API."""

TOKENS_S = 10.0
"""For a service's workflow to take its tokens; without a worker the next round tries again."""

ENDPOINTS_S = 10.0
"""Between two looks at the endpoints. A load balancer that was killed is back after this, for nobody else starts it;
its counters are scraped by Prometheus every 15 s by habit."""

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
        self._outbox = Outbox(db, client, settings.task_queue)
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
        await self._outbox.deliver_accepted(PENDING_AFTER_S)
        await self._deliver_tokens()
        await self._find_silent(now)
        await self._count()
        self._look_at_endpoints()

    async def _deliver_tokens(self) -> None:
        """Tokens that were changed by an API that died before it could deliver them."""
        for service_id in await pending_tokens(self._db):
            try:
                await self._outbox.deliver_tokens(service_id, SYSTEM, TOKENS_S)
            except (WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
                log.warning("tokens are still pending", service=service_id, why=str(error.cause or error))
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:
                    raise
                # It does not run: its next deploy brings the tokens.

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
