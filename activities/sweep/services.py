"""The sweep of what services have: endpoints that nobody owns, and services whose workflow somebody ended by hand. As
with machines, the load balancers are listed *first*, then their owners are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta

import structlog
from sqlalchemy import select
from temporalio import activity
from temporalio.client import Client, WorkflowQueryFailedError
from temporalio.service import RPCError

from clouds.contract.balancer import LoadBalancer
from heliostat.errors import CloudError
from heliostat.models.clusters import ClusterState
from heliostat.models.common import Event, EventLevel, Model, new_id, utcnow
from heliostat.models.services import ServiceState, ServiceVersionState
from runtime.messages.clusters import ClusterHandle, Release
from runtime.messages.common import reached
from runtime.messages.services import ServiceHandle
from runtime.settings import Settings
from store.database import Database
from store.services import rows as records
from store.tables import clusters, services

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
        settings: Settings,
        installation_id: str,
    ) -> None:
        self._db = db
        self._client = client
        self._balancers = balancers
        self._settings = settings
        self._installation_id = installation_id

    @activity.defn
    async def sweep_services(self) -> ServiceSweep:
        """Settles the orphaned first, so that their endpoints are nobody's by then."""
        result = ServiceSweep()
        held: list[tuple[LoadBalancer, list[str]]] = []
        for cloud_id, balancer in sorted(self._balancers.items()):
            try:
                held.append((balancer, await asyncio.to_thread(balancer.list_owned, self._installation_id)))
            except CloudError as e:  # it must not keep the others' from being looked at
                log.error("a cloud's endpoints can't be listed", cloud=cloud_id, why=str(e))
                result.failed.append(cloud_id)
            activity.heartbeat()
        clusters_of = await self._old_clusters()
        for service_id in await self._old_living():
            activity.heartbeat(service_id)
            if not await ServiceHandle(self._client, service_id).runs():
                await self._settle(service_id)
                result.orphaned.append(service_id)
            else:
                result.released += await self._settle_unknown(service_id, clusters_of.get(service_id, []))
        for balancer, found in held:
            result.endpoints += len(found)
            for service_id in found:
                activity.heartbeat(service_id)
                if await ServiceHandle(self._client, service_id).runs():
                    continue  # it owns its endpoint from before it is made until after it is gone
                log.error("removing an endpoint that nobody owns", service=service_id)
                await asyncio.to_thread(balancer.remove, service_id)
                result.removed.append(service_id)
        return result

    async def _old_living(self) -> list[str]:
        before = utcnow() - timedelta(seconds=self._settings.newborn_grace_s)
        async with self._db.read() as conn:
            found = await conn.scalars(
                select(services.c.id).where(
                    services.c.ended_at.is_(None), services.c.withdrawn.is_(False), services.c.created_at < before
                )
            )
            return [str(i) for i in found]

    async def _old_clusters(self) -> dict[str, list[str]]:
        """By service. Listed before their owner is asked, which holds a cluster from before it is made until it has
        been released: one that ends was."""
        before = utcnow() - timedelta(seconds=self._settings.newborn_grace_s)
        found: dict[str, list[str]] = {}
        async with self._db.read() as conn:
            for row in await conn.execute(
                select(clusters.c.id, clusters.c.service_id).where(
                    clusters.c.service_id.is_not(None),
                    clusters.c.ended_at.is_(None),
                    clusters.c.state != ClusterState.TERMINATING,
                    clusters.c.created_at < before,
                )
            ):
                found.setdefault(row.service_id, []).append(row.id)
        return found

    async def _settle_unknown(self, service_id: str, cluster_ids: list[str]) -> list[str]:
        """What a workflow before this one has left: its clusters are released, its versions have ended."""
        before = utcnow() - timedelta(seconds=self._settings.newborn_grace_s)
        async with self._db.read() as conn:
            living = [v.version for v in await records.versions_of(conn, service_id) if v.ended_at is None]
        old = [v for v in living if v.created_at < before]
        if not cluster_ids and not old:
            return []
        handle = ServiceHandle(self._client, service_id)
        try:
            owned, known = await handle.owned(), await handle.status()
        except (RPCError, WorkflowQueryFailedError) as error:
            log.warning("a service could not be asked what it has", service=service_id, why=str(error))
            return []  # unknown counts as owned; the next sweep asks again
        reason, now = "the workflow that made it was ended in Temporal by hand", utcnow()
        ended = {"state": ServiceVersionState.TERMINATED, "reason": reason, "state_since": now, "ended_at": now}
        ids = {v.id for v in known.versions}
        over = [v.model_copy(update={**ended, "weight": 0}) for v in old if v.id not in ids]
        await records.end_versions(self._db, over)
        unowned = [i for i in cluster_ids if i not in owned]
        for cluster_id in unowned:
            log.error("releasing a cluster that nobody owns", service=service_id, cluster=cluster_id)
            await reached(
                ClusterHandle(self._client, cluster_id).release(Release(holder=service_id, end=True, reason=reason))
            )
        return unowned

    async def _settle(self, service_id: str) -> None:
        """Its record says so; its clusters are released, each of which ends by itself then."""
        row = await records.load_service(self._db, service_id)
        # One that waits for its deploy to reach the workflow is the monitor's.
        if row is None or row.state.settled or await records.unstarted_deploys(self._db, 0, service_id):
            return
        now, reason = utcnow(), "its workflow was ended in Temporal by hand"
        async with self._db.read() as conn:
            held = await conn.scalars(
                select(clusters.c.id).where(clusters.c.service_id == service_id, clusters.c.ended_at.is_(None))
            )
            cluster_ids = list(held)
            versions = [v.version for v in await records.versions_of(conn, service_id) if v.ended_at is None]
        for cluster_id in cluster_ids:
            await reached(
                ClusterHandle(self._client, cluster_id).release(Release(holder=service_id, end=True, reason=reason))
            )
        ended = {"reason": reason, "state_since": now, "ended_at": now}
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
        story = Event(
            id=new_id("ev"),
            resource_id=service_id,
            at=now,
            level=EventLevel.ERROR,
            kind="orphaned",
            actor="sweep",
            message=reason,
        )
        await records.write_service(self._db, service, over, [story])
