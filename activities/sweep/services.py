"""The sweep of what services have: endpoints that nobody owns, and services whose workflow somebody ended by hand. As
with machines, the load balancers are listed *first*, then their owners are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta

import structlog
from temporalio import activity
from temporalio.client import Client, WorkflowQueryFailedError
from temporalio.service import RPCError

from activities.sweep.result import ENDED_BY_HAND, orphaned_event
from clouds.contract.balancer import LoadBalancer
from heliostat.errors import CloudError
from heliostat.models.common import Model, utcnow
from heliostat.models.services import ServiceState, ServiceVersionState
from runtime.messages.clusters import ClusterHandle, Release
from runtime.messages.common import reached
from runtime.messages.services import ServiceHandle
from store import sweeps
from store.database import Database
from store.services import rows as records

log = structlog.get_logger(__name__)


class ServiceSweep(Model):
    endpoints: int = 0
    """Seen under our tag."""
    removed: list[str] = []
    """Service ids whose endpoint nobody owned."""
    orphaned: list[str] = []
    """Services whose workflow somebody ended by hand: their clusters were released."""
    released: list[str] = []
    """Clusters of services that run, of which their workflow knows nothing: it is a second one, begun after somebody
    had ended the first one by hand."""
    failed: list[str] = []
    """Ids of clouds whose endpoints could not be listed."""


class ServiceSweepActivities:
    def __init__(
        self,
        db: Database,
        client: Client,
        balancers: Mapping[str, LoadBalancer],
        installation_id: str,
        newborn_grace_s: float,
    ) -> None:
        self._db = db
        self._client = client
        self._balancers = balancers
        self._installation_id = installation_id
        self._newborn_grace_s = newborn_grace_s

    @activity.defn
    async def sweep_services(self) -> ServiceSweep:
        """Settles the orphaned first, so that their endpoints are nobody's by then."""
        result = ServiceSweep()
        held: list[tuple[LoadBalancer, list[str]]] = []
        for cloud_id, balancer in sorted(self._balancers.items()):
            try:
                held.append((balancer, await asyncio.to_thread(balancer.list_owned, self._installation_id)))
            except CloudError as e:  # it must not stop the sweep of the others
                log.error("the endpoints of a cloud can't be listed", cloud=cloud_id, why=str(e))
                result.failed.append(cloud_id)
            activity.heartbeat()
        before = utcnow() - timedelta(seconds=self._newborn_grace_s)
        # Listed before their owner is asked, which holds a cluster from before it is made until it has been released.
        clusters_of = await sweeps.clusters_by_service(self._db, before)
        for service_id in await sweeps.living_services(self._db, before):
            activity.heartbeat(service_id)
            if not await self._runs(service_id):
                await self._settle(service_id)
                result.orphaned.append(service_id)
            else:
                result.released += await self._settle_unknown(service_id, clusters_of.get(service_id, []), before)
        for balancer, found in held:
            result.endpoints += len(found)
            for service_id in found:
                activity.heartbeat(service_id)
                if await self._runs(service_id):
                    continue  # it owns its endpoint from before it is made until after it is gone
                log.error("removing an endpoint that nobody owns", service=service_id)
                await asyncio.to_thread(balancer.remove, service_id)
                result.removed.append(service_id)
        return result

    async def _runs(self, service_id: str) -> bool:
        """Raises RPCError when Temporal can't be asked: the sweep is tried again."""
        return await ServiceHandle(self._client, service_id).runs()

    async def _settle_unknown(self, service_id: str, cluster_ids: list[str], before: datetime) -> list[str]:
        """What an earlier workflow of the service has left: its clusters are released, its versions have ended."""
        async with self._db.read() as conn:
            living = [v.version for v in await records.versions_of(conn, service_id) if v.ended_at is None]
        old = [v for v in living if v.created_at < before]
        if not cluster_ids and not old:
            return []
        handle = ServiceHandle(self._client, service_id)
        try:
            owned, known = await handle.owned(), await handle.status()
        except (RPCError, WorkflowQueryFailedError) as error:
            log.warning("a service could not be asked what it owns", service=service_id, why=str(error))
            return []  # unknown counts as owned; the next sweep asks again
        reason, now = "the workflow that made it was ended in Temporal by hand", utcnow()
        ended = {"state": ServiceVersionState.TERMINATED, "reason": reason, "state_since": now, "ended_at": now}
        ids = {v.id for v in known.versions}
        over = [v.model_copy(update={**ended, "weight": 0}) for v in old if v.id not in ids]
        await records.end_versions(self._db, over)
        unowned = [i for i in cluster_ids if i not in owned]
        for cluster_id in unowned:
            log.error("releasing a cluster that nobody owns", service=service_id, cluster=cluster_id)
            await self._release(cluster_id, service_id, reason)
        return unowned

    async def _settle(self, service_id: str) -> None:
        """Its record says so; its clusters are released, each of which ends by itself then."""
        row = await records.load_service(self._db, service_id)
        # The monitor delivers a pending deploy, which starts the workflow again.
        if row is None or row.state.settled or await records.unstarted_deploys(self._db, 0, service_id):
            return
        now = utcnow()
        async with self._db.read() as conn:
            versions = [v.version for v in await records.versions_of(conn, service_id) if v.ended_at is None]
        for cluster_id in await sweeps.clusters_of_service(self._db, service_id):
            await self._release(cluster_id, service_id, ENDED_BY_HAND)
        ended = {"reason": ENDED_BY_HAND, "state_since": now, "ended_at": now}
        service = row.service.model_copy(
            update={
                **ended,
                "state": ServiceState.TERMINATED,
                "waits_for": "",
                "rollout": None,
                "query_url": None,
                "revision": row.revision + 1,
            }
        )
        over = [v.model_copy(update={**ended, "state": ServiceVersionState.TERMINATED, "weight": 0}) for v in versions]
        await records.write_service(self._db, service, over, [orphaned_event(service_id)])

    async def _release(self, cluster_id: str, service_id: str, reason: str) -> None:
        release = Release(holder=service_id, end=True, reason=reason)
        await reached(ClusterHandle(self._client, cluster_id).release(release))
