"""The sweep: no leaked machine, ever. It takes no input and trusts no record of what was launched: it lists what
each cloud holds under our tag, *then* asks the owners, and ends what nobody owns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import TypeVar

import structlog
from sqlalchemy import insert, select
from temporalio import activity
from temporalio.client import Client, WorkflowQueryFailedError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from activities.sweep.result import SweepResult
from clouds.contract.bucket import Bucket, StoredObject
from clouds.contract.machines import Machine, Machines, MachineState
from heliostat.errors import CloudError
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.common import Event, EventLevel, new_id, utcnow
from heliostat.models.jobs import JobState, RunCause, RunState
from runtime.messages.clusters import ClusterHandle, ClusterNotice, LeaseHolderHandle, Release
from runtime.messages.common import reached
from runtime.messages.jobs import JobHandle
from runtime.settings import Settings
from runtime.telemetry import SWEEP_FOUND
from store import clusters as cluster_records
from store import jobs as job_records
from store import retention
from store import revisions as projection
from store.database import Database
from store.tables import clusters, jobs, sweeps

log = structlog.get_logger(__name__)
T = TypeVar("T")
LIVES_S = 30.0
"""Temporal says within milliseconds whether a cluster's workflow runs; without a word the sweep is tried again."""


class SweepActivities:
    def __init__(
        self,
        db: Database,
        client: Client,
        machines: Mapping[str, Machines],
        buckets: Mapping[str, Bucket],
        settings: Settings,
        installation_id: str,
        cloud_names: Mapping[str, str] | None = None,
    ) -> None:
        self._cloud_names = cloud_names or {}
        self._db = db
        self._client = client
        self._machines = machines
        self._buckets = buckets
        self._settings = settings
        self._installation_id = installation_id

    @activity.defn
    async def sweep_cloud(self, cloud_id: str) -> SweepResult:
        """One cloud: list by tag first, ask the owners second, spare the newborn, end the rest, say so."""
        began = time.monotonic()
        cloud = await asyncio.to_thread(self._machines.get, cloud_id)  # it may be newer than this worker's last look
        if cloud is None:
            return SweepResult()  # deleted since it was listed, which was refused while anything lived there
        held = await asyncio.to_thread(cloud.list_owned, self._installation_id)
        born_before = utcnow() - timedelta(seconds=self._settings.newborn_grace_s)
        old = [m for m in held if m.launched_at < born_before and m.state != MachineState.GONE]
        owned: dict[str, set[str] | None] = {}
        for cluster_id in {m.cluster_id for m in old if m.cluster_id}:
            activity.heartbeat(cluster_id)
            owned[cluster_id] = await self._owned_nodes(cluster_id)
        orphans = [m for m in old if self._is_orphan(m, owned)]
        if orphans:  # but for those that their owner has ended since they were listed: it owns them until they are gone
            seen = await asyncio.to_thread(cloud.describe, [m.machine_id for m in orphans])
            there = {m.machine_id for m in seen if m.state != MachineState.GONE}
            orphans = [m for m in orphans if m.machine_id in there]
        failed: CloudError | None = None
        if orphans:
            for machine in orphans:
                log.error("ending a machine that nobody owns", machine=machine.machine_id, cluster=machine.cluster_id)
            failed = await self._end(cloud, [m.machine_id for m in orphans])
            if failed is not None:  # that one, which somebody protects, keeps nothing else from being swept
                seen = await asyncio.to_thread(cloud.describe, [m.machine_id for m in orphans])
                lives_on = {m.machine_id for m in seen if m.state in (MachineState.PENDING, MachineState.RUNNING)}
                orphans = [m for m in orphans if m.machine_id not in lives_on]
            SWEEP_FOUND.labels(cloud=self._cloud_names.get(cloud_id, cloud_id)).inc(len(orphans))
            await projection.add_events(self._db, [self._event(m) for m in orphans if m.cluster_id])
        ended = [m.machine_id for m in orphans]
        async with self._db.begin() as conn:
            await conn.execute(
                insert(sweeps).values(
                    id=new_id("sw"),
                    cloud=cloud_id,
                    found=len(held),
                    ended=ended,
                    seconds=time.monotonic() - began,
                    at=utcnow(),
                )
            )
        activity.heartbeat()
        loop = asyncio.get_running_loop()

        def lives(cluster_id: str) -> bool:
            return asyncio.run_coroutine_threadsafe(self._lives(cluster_id), loop).result(LIVES_S)

        grace_s = self._settings.newborn_grace_s
        left = await asyncio.to_thread(cloud.delete_orphans, self._installation_id, grace_s, lives)
        if left:
            log.error("deleted what belonged to no machine", cloud=cloud_id, things=left)
        if failed is not None:
            raise failed
        return SweepResult(machines=len(held), ended=ended, leftovers=left)

    async def _end(self, cloud: Machines, machine_ids: list[str]) -> CloudError | None:
        """Why one of them could not be ended; the others were."""
        try:
            await asyncio.to_thread(cloud.terminate, machine_ids)
        except CloudError as error:
            return error
        return None

    def _is_orphan(self, machine: Machine, owned: Mapping[str, set[str] | None]) -> bool:
        if machine.cluster_id is None:
            return True
        nodes = owned[machine.cluster_id]
        if nodes is None:
            return False  # its owner could not be asked: unknown counts as owned
        return machine.node_id not in nodes

    async def _owned_nodes(self, cluster_id: str) -> set[str] | None:
        """Node ids that the cluster's workflow owns; empty if it runs no more; None if it could not be asked."""
        handle = ClusterHandle(self._client, cluster_id)
        try:
            if not await handle.runs():
                return set()
            owned = await handle.owned()
        except RPCError as error:
            return set() if error.status == RPCStatusCode.NOT_FOUND else None
        except WorkflowQueryFailedError:
            return None
        return {machine.node_id for machine in owned}

    async def _lives(self, cluster_id: str) -> bool:
        """Also while it has no node at all; unknown counts as living."""
        try:
            return bool(cluster_id) and await ClusterHandle(self._client, cluster_id).runs()
        except RPCError:
            return True

    def _event(self, machine: Machine) -> Event:
        return Event(
            id=new_id("ev"),
            resource_id=str(machine.cluster_id),
            at=utcnow(),
            level=EventLevel.WARNING,
            kind="swept",
            actor="sweep",
            message=f"machine {machine.machine_id} was owned by nobody and was ended",
        )

    @activity.defn
    async def settle_orphans(self) -> SweepResult:
        """Clusters and jobs whose workflow was terminated by hand: their record says so, their holders are told,
        their leases are given back. Machines are the sweep's of the clouds."""
        result = SweepResult()
        before = utcnow() - timedelta(seconds=self._settings.newborn_grace_s)
        async with self._db.read() as conn:
            cluster_ids = list(
                await conn.scalars(
                    select(clusters.c.id).where(
                        clusters.c.ended_at.is_(None), clusters.c.started.is_(True), clusters.c.created_at < before
                    )
                )
            )
            job_ids = list(
                await conn.scalars(
                    select(jobs.c.id).where(
                        jobs.c.ended_at.is_(None), jobs.c.started.is_(True), jobs.c.created_at < before
                    )
                )
            )
            # Made for a job that was settled before it knew of its cluster: the lease would be looked at in two hours.
            forsaken = list(
                await conn.execute(
                    select(clusters.c.id, clusters.c.job_id)
                    .join(jobs, jobs.c.id == clusters.c.job_id)
                    .where(
                        clusters.c.ended_at.is_(None),
                        clusters.c.started.is_(True),
                        clusters.c.state != ClusterState.TERMINATING,
                        jobs.c.ended_at < before,
                    )
                )
            )
        for cluster_id, job_id in forsaken:
            activity.heartbeat(cluster_id)
            release = Release(holder=job_id, end=True, reason="its job has ended")
            await reached(ClusterHandle(self._client, cluster_id).release(release))
        for cluster_id in cluster_ids:
            activity.heartbeat(cluster_id)
            if not await ClusterHandle(self._client, cluster_id).runs():
                await self._settle_cluster(cluster_id)
                result.orphaned.append(cluster_id)
        for job_id in job_ids:
            activity.heartbeat(job_id)
            if not await JobHandle(self._client, job_id).runs():
                await self._settle_job(job_id)
                result.orphaned.append(job_id)
        return result

    async def _settle_cluster(self, cluster_id: str) -> None:
        row = await cluster_records.load_cluster(self._db, cluster_id)
        if row is None or row.cluster.state.settled:
            return
        now, reason = utcnow(), "its workflow was ended in Temporal by hand"
        cluster = row.cluster.model_copy(
            update={
                "state": ClusterState.FAILED,
                "reason": reason,
                "waits_for": "",
                "state_since": now,
                "ended_at": now,
                "revision": row.revision + 1,
            }
        )
        holders = [lease.holder for lease in row.cluster.leases if not lease.holder.startswith("user:")]
        made_for = row.input.made_for
        if made_for and made_for not in holders:
            holders.append(made_for)
        notice = ClusterNotice(
            cluster_id=cluster_id,
            state=ClusterState.FAILED,
            ready=False,
            reason=reason,
            cause="cluster_failed",
            event_id=f"{cluster_id}/orphaned",
            revision=row.revision + 1,
        )
        for holder in holders:
            await reached(LeaseHolderHandle(self._client, holder).cluster_changed(notice))
        ended = [
            node.model_copy(update={"state": NodeState.TERMINATED, "reason": reason, "ended_at": now})
            for node in await cluster_records.load_nodes(self._db, cluster_id)
            if node.ended_at is None
        ]
        await cluster_records.write_cluster(self._db, cluster, ended, {}, [self._story(cluster_id, reason)])

    async def _settle_job(self, job_id: str) -> None:
        row = await job_records.load_job(self._db, job_id)
        if row is None or row.job.state.settled:
            return
        now, reason = utcnow(), "its workflow was ended in Temporal by hand"
        lost = {
            "state": RunState.FAILED,
            "cause": RunCause.INFRASTRUCTURE,
            "reason": reason,
            "ended_at": now,
        }
        job = row.job.model_copy(
            update={
                "state": JobState.FAILED,
                "runs": [run if run.ended_at else run.model_copy(update=lost) for run in row.job.runs],
                "reason": reason,
                "waits_for": "",
                "state_since": now,
                "ended_at": now,
                "revision": row.revision + 1,
            }
        )
        if row.job.cluster_id:
            release = Release(holder=job_id, end=row.input.cluster_id is None, reason=reason)
            await reached(ClusterHandle(self._client, row.job.cluster_id).release(release))
        await job_records.write_job(self._db, job, [self._story(job_id, reason)])

    def _story(self, resource_id: str, reason: str) -> Event:
        return Event(
            id=new_id("ev"),
            resource_id=resource_id,
            at=utcnow(),
            level=EventLevel.ERROR,
            kind="orphaned",
            actor="sweep",
            message=reason,
        )

    @activity.defn
    async def keep_house(self) -> dict[str, int]:
        """Deletes what is older than the retention settings: records, events, logs, uploads, what is left of local
        machines. Counts what went. A cloud that refuses or is out of reach keeps no other one from it: it is told of by
        the error, when the others are done."""
        now = utcnow()
        s = self._settings
        counts: dict[str, int] = {}
        while True:
            gone = await retention.delete_old(
                self._db,
                records_before=now - timedelta(days=s.retention_records_days),
                events_before=now - timedelta(days=s.retention_events_days),
            )
            activity.heartbeat()
            for table, number in gone.items():
                counts[table] = counts.get(table, 0) + number
            if not any(gone.values()):
                break
        failed: dict[str, CloudError] = {}
        kept_s = max(s.retention_logs_days, 1.0) * 86_400
        for cloud_id, machines in list(self._machines.items()):
            pruned = await self._unless_failed(cloud_id, failed, partial(machines.forget_ended, kept_s))
            counts["machines"] = counts.get("machines", 0) + len(pruned or [])
            activity.heartbeat()
        for cloud_id, cluster_id in await retention.logs_before(self._db, now - timedelta(days=s.retention_logs_days)):
            bucket = self._buckets.get(cloud_id)
            if bucket is not None and cloud_id not in failed:
                logs = partial(_delete, bucket, f"logs/{cluster_id}/", lambda _: True)
                deleted = await self._unless_failed(cloud_id, failed, logs)
                if deleted is not None:
                    counts["log objects"] = counts.get("log objects", 0) + deleted
                    await retention.forget_logs(self._db, [cluster_id])
            activity.heartbeat()
        in_use = await retention.uploads_in_use(self._db)
        before = now - timedelta(days=s.retention_uploads_days)

        def is_old(upload: StoredObject) -> bool:
            digest = upload.key.rsplit("/", 1)[-1].removesuffix(".zip")
            return upload.modified_at < before and digest not in in_use

        for cloud_id, bucket in list(self._buckets.items()):
            if cloud_id not in failed:
                gone_here = await self._unless_failed(cloud_id, failed, partial(_delete, bucket, "uploads/", is_old))
                counts["uploads"] = counts.get("uploads", 0) + (gone_here or 0)
                activity.heartbeat()
        if failed:
            why = "; ".join(f"{self._cloud_names.get(id, id)}: {error}" for id, error in failed.items())
            raise ApplicationError(
                f"Not all clouds could be looked after: {why}", type="cloud_error", non_retryable=True
            )
        return counts

    async def _unless_failed(self, cloud_id: str, failed: dict[str, CloudError], work: Callable[[], T]) -> T | None:
        """What ``work`` gives, on a thread; None, and noted in ``failed``, when the cloud fails."""
        try:
            return await asyncio.to_thread(work)
        except CloudError as e:
            log.error("a cloud is left as it is", cloud=self._cloud_names.get(cloud_id, cloud_id), why=str(e))
            failed[cloud_id] = e
            return None

    @activity.defn
    async def list_clouds(self) -> list[str]:
        return sorted(self._machines)


def _delete(bucket: Bucket, prefix: str, which: Callable[[StoredObject], bool]) -> int:
    keys = [o.key for o in bucket.list(prefix) if which(o)]
    bucket.delete(keys)
    return len(keys)
