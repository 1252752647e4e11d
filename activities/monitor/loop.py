"""The monitor: one loop for all clusters, in one activity that never ends and writes no history."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta

import structlog
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
from store.clusters import count_clusters
from store.database import Database
from store.outbox import Outbox
from store.services.tokens import pending_tokens

log = structlog.get_logger(__name__)

PENDING_AFTER_S = 10.0
"""The API starts a workflow within milliseconds of accepting; what is pending for this long has lost its API."""

TOKENS_S = 10.0
"""For a service's workflow to take its tokens; without a worker the next round tries again."""

ENDPOINTS_S = 10.0
"""Between two polls of the endpoints. A load balancer that was killed is back after this, since nobody else starts it.
Prometheus usually scrapes its counters every 15 s."""

MASS_SHARE = 0.5
MASS_MIN = 3
"""More than this share of all heads silent at once, and at least this many: the API can't receive, or a whole network
is down. An alarm, not a mass replacement: only heads whose cloud says that the machine has ended count as lost."""


class MonitorActivities:
    def __init__(
        self,
        db: Database,
        client: Client,
        settings: Settings,
        endpoints: EndpointWatch | None = None,
    ) -> None:
        self._endpoints = endpoints
        self._polled_at = -ENDPOINTS_S
        self._poll: asyncio.Task[None] | None = None
        self._db = db
        self._client = client
        self._outbox = Outbox(db, client, settings.task_queue)
        self._settings = settings
        self._reported: dict[str, datetime] = {}
        """By silent head: when its workflow got the last message about it."""
        self._mass_silence = False

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
            CLUSTERS.clear()  # the next watcher counts them: two workers must not both
            self._stop_polling()

    async def round(self, now: datetime) -> None:
        """Checks everything once; ``now`` is the records' time."""
        await self._outbox.deliver_accepted(PENDING_AFTER_S)
        await self._deliver_tokens()
        await self._find_silent(now)
        await self._count()
        self._poll_endpoints()

    async def _deliver_tokens(self) -> None:
        """Tokens that were changed by an API that died before it could deliver them."""
        for service_id in await pending_tokens(self._db):
            activity.heartbeat()  # each may take TOKENS_S; together they may take longer than the heartbeat timeout
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
        if mass and not self._mass_silence:
            log.error(
                "mass silence: only heads whose machine has ended are replaced while it lasts; check the network "
                "between nodes and API",
                silent=len(found.silent),
                total=found.total,
            )
        self._mass_silence = mass
        again = timedelta(seconds=self._settings.silence_s)
        # A head that boots tells nothing about the network: it does not count towards a mass silence.
        silent = found.silent + await heartbeats.heads_never_heard(self._db, now, self._settings.silence_s)
        self._reported = {node: at for node, at in self._reported.items() if any(node == n for _, n, _ in silent)}
        for cluster_id, node_id, since in silent:
            last = self._reported.get(node_id)
            if last is not None and now - last < again:
                continue
            self._reported[node_id] = now
            log.warning("head silent", cluster=cluster_id, node=node_id, since=since.isoformat())
            message = HeadSilent(
                event_id=f"{node_id}/silent/{now.isoformat()}",
                node_id=node_id,
                since=since,
                silent_s=(now - since).total_seconds(),
                mass=mass,
            )
            await reached(ClusterHandle(self._client, cluster_id).head_silent(message))

    def _poll_endpoints(self) -> None:
        """Apart from the rounds: a slow endpoint must not delay the detection of a silent head."""
        if self._endpoints is None:
            return
        if self._poll is not None and self._poll.done():
            self._poll.result()  # its failure ends this attempt, as a round's failure does
            self._poll = None
        if self._poll is None and time.monotonic() - self._polled_at >= ENDPOINTS_S:
            self._polled_at = time.monotonic()
            self._poll = asyncio.create_task(self._endpoints.poll())

    def _stop_polling(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        if self._endpoints is not None:
            self._endpoints.close()

    async def _count(self) -> None:
        counts = await count_clusters(self._db)
        for state in ClusterState:
            if not state.settled:
                CLUSTERS.labels(state=state).set(counts.get(state, 0))
