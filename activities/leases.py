"""Requests of workflows to other workflows: leases, liveness, starts. Activities, because a workflow can signal another
workflow but can't send it an update."""

from __future__ import annotations

from temporalio import activity
from temporalio.client import (
    Client,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from heliostat.models.clusters import Cluster, ClusterState
from heliostat.models.common import Model
from runtime.messages.clusters import ClusterHandle, ClusterInput, LeaseAnswer, LeaseRequest, Release
from runtime.messages.common import WorkflowHandle, reached
from store import clusters as cluster_records
from store.database import Database
from store.outbox import Outbox, is_cancelled


class MadeCluster(Model):
    """A job's or service's own cluster, created in the same way as a user's. Its creator holds a lease from the
    start."""

    cluster: Cluster
    input: ClusterInput


class AcquireLease(Model):
    cluster_id: str
    holder: str


class ReleaseLease(Model):
    cluster_id: str
    release: Release


class LeaseActivities:
    def __init__(self, db: Database, client: Client, task_queue: str) -> None:
        self._db = db
        self._client = client
        self._outbox = Outbox(db, client, task_queue)

    @activity.defn
    async def start_service_cluster(self, request: MadeCluster) -> None:
        """Row first, then the workflow; both repeatable, since the ids are derived."""
        await self._start(request)

    @activity.defn
    async def start_job_cluster(self, request: MadeCluster) -> bool:
        """The same for a job. False: the job's request was cancelled, nothing was made."""
        job_id = request.input.job_id
        if job_id is not None and await is_cancelled(self._db, "job", job_id):
            return False
        await self._start(request)
        return True

    async def _start(self, request: MadeCluster) -> None:
        if not await cluster_records.insert_made_cluster(self._db, request.cluster, request.input):
            raise ApplicationError(
                f"cluster {request.cluster.id} can't be created: another one has the name {request.cluster.name}; "
                "it is tried again until that one has ended",
                type="conflict",
            )
        await self._outbox.start_cluster(request.input)

    @activity.defn
    async def acquire_lease(self, request: AcquireLease) -> LeaseAnswer:
        """Requests a lease of a cluster; the answer comes at once. A cluster that has ended is an answer, not an
        error."""
        if request.holder.startswith("job_") and await is_cancelled(self._db, "job", request.holder):
            raise ApplicationError("The request was cancelled.", type="withdrawn", non_retryable=True)
        info = activity.info()
        try:
            return await ClusterHandle(self._client, request.cluster_id).acquire(
                LeaseRequest(holder=request.holder), key=f"{info.workflow_id}-{info.activity_id}"
            )
        except WorkflowUpdateFailedError as error:
            reason = error.cause.message if isinstance(error.cause, ApplicationError) else str(error.cause or error)
        except WorkflowUpdateRPCTimeoutOrCancelledError as error:
            raise ApplicationError(f"cluster {request.cluster_id} does not answer: its worker is away") from error
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            reason = f"cluster {request.cluster_id} has ended"
        return LeaseAnswer(
            cluster_id=request.cluster_id,
            state=ClusterState.TERMINATED,
            ready=False,
            reason=reason,
            cause="cluster_failed",
        )

    @activity.defn
    async def release_lease(self, request: ReleaseLease) -> None:
        """A cluster that has ended holds no leases: nothing is left to do."""
        await reached(ClusterHandle(self._client, request.cluster_id).release(request.release))

    @activity.defn
    async def ended_holders(self, holders: list[str]) -> list[str]:
        """Those of ``holders`` whose workflow no longer runs."""
        return [holder for holder in holders if not await WorkflowHandle(self._client, holder).runs()]
