"""Clusters and jobs whose workflow somebody has ended in Temporal by hand: their records, holders and leases are
settled. Their machines are ended by the sweep of machines."""

from __future__ import annotations

from datetime import timedelta

from temporalio import activity
from temporalio.client import Client

from activities.sweep.result import ENDED_BY_HAND, SweepResult, orphaned_event
from heliostat.models.clusters import ClusterState, NodeState
from heliostat.models.common import utcnow
from heliostat.models.jobs import JobState, RunCause, RunState
from runtime.messages.clusters import ClusterHandle, ClusterNotice, LeaseHolderHandle, Release
from runtime.messages.common import WorkflowHandle, reached
from store import clusters as cluster_records
from store import jobs as job_records
from store import sweeps
from store.database import Database


class RecordSweepActivities:
    def __init__(self, db: Database, client: Client, newborn_grace_s: float) -> None:
        self._db = db
        self._client = client
        self._newborn_grace_s = newborn_grace_s

    @activity.defn
    async def settle_orphans(self) -> SweepResult:
        result = SweepResult()
        before = utcnow() - timedelta(seconds=self._newborn_grace_s)
        cluster_ids = await sweeps.living_clusters(self._db, before)
        job_ids = await sweeps.living_jobs(self._db, before)
        # Else their lease would be checked in two hours only.
        for cluster_id, job_id in await sweeps.clusters_of_ended_jobs(self._db, before):
            activity.heartbeat(cluster_id)
            release = Release(holder=job_id, end=True, reason="its job has ended")
            await reached(ClusterHandle(self._client, cluster_id).release(release))
        for cluster_id in cluster_ids:
            activity.heartbeat(cluster_id)
            if not await WorkflowHandle(self._client, cluster_id).runs():
                await self._settle_cluster(cluster_id)
                result.orphaned.append(cluster_id)
        for job_id in job_ids:
            activity.heartbeat(job_id)
            if not await WorkflowHandle(self._client, job_id).runs():
                await self._settle_job(job_id)
                result.orphaned.append(job_id)
        return result

    async def _settle_cluster(self, cluster_id: str) -> None:
        row = await cluster_records.load_cluster(self._db, cluster_id)
        if row is None or row.cluster.state.settled:
            return
        now = utcnow()
        cluster = row.cluster.model_copy(
            update={
                "state": ClusterState.FAILED,
                "reason": ENDED_BY_HAND,
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
            reason=ENDED_BY_HAND,
            cause="cluster_failed",
            event_id=f"{cluster_id}/orphaned",
            revision=row.revision + 1,
        )
        for holder in holders:
            await reached(LeaseHolderHandle(self._client, holder).cluster_changed(notice))
        ended = [
            node.model_copy(update={"state": NodeState.TERMINATED, "reason": ENDED_BY_HAND, "ended_at": now})
            for node in await cluster_records.load_nodes(self._db, cluster_id)
            if node.ended_at is None
        ]
        await cluster_records.write_cluster(self._db, cluster, ended, {}, [orphaned_event(cluster_id)])

    async def _settle_job(self, job_id: str) -> None:
        row = await job_records.load_job(self._db, job_id)
        if row is None or row.job.state.settled:
            return
        now = utcnow()
        lost = {
            "state": RunState.FAILED,
            "cause": RunCause.INFRASTRUCTURE,
            "reason": ENDED_BY_HAND,
            "ended_at": now,
        }
        job = row.job.model_copy(
            update={
                "state": JobState.FAILED,
                "runs": [run if run.ended_at else run.model_copy(update=lost) for run in row.job.runs],
                "reason": ENDED_BY_HAND,
                "waits_for": "",
                "state_since": now,
                "ended_at": now,
                "revision": row.revision + 1,
            }
        )
        if row.job.cluster_id:
            release = Release(holder=job_id, end=row.input.cluster_id is None, reason=ENDED_BY_HAND)
            await reached(ClusterHandle(self._client, row.job.cluster_id).release(release))
        await job_records.write_job(self._db, job, [orphaned_event(job_id)])
