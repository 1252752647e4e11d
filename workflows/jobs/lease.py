"""The cluster that the job runs on: the one that its config names, or one of its own. Undo: ``release``."""

from __future__ import annotations

from collections.abc import Callable

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from activities.leases import AcquireLease, LeaseActivities, MadeCluster
    from heliostat.models.clusters import Cluster, ClusterState
    from heliostat.models.jobs import RunCause, RunState
    from runtime.messages.clusters import ClusterInput, LeaseAnswer, Release
    from runtime.messages.jobs import JobInput
    from workflows import ids, policies
    from workflows.entity.leases import release_cluster
    from workflows.jobs.state import JobData, Outcome

ENDING = (ClusterState.TERMINATING, ClusterState.TERMINATED, ClusterState.FAILED)


class ClusterLease:
    def __init__(self, request: JobInput, state: JobData) -> None:
        self.cluster: LeaseAnswer | None = None
        """What the cluster said last."""
        self.cluster_id: str | None = None
        self._input = request
        self._s = state
        self._made = False

    def is_ready(self) -> bool:
        return self.cluster is not None and self.cluster.ready

    async def request(self) -> str | None:
        """Makes sure that there is a cluster with the job's lease on it; the reason when it failed."""
        if self._input.cluster_id is not None:
            if self.cluster_id is None:
                self.cluster_id = self._input.cluster_id
                return await self.acquire()
        elif not self._made:
            return await self._make()
        return None

    def update(self, answer: LeaseAnswer) -> None:
        """An answer and a notice may cross on their way: the older one is ignored."""
        if answer.cluster_id != self.cluster_id:
            return
        if self.cluster is None or answer.state.settled or answer.revision >= self.cluster.revision:
            self.cluster = answer

    def changed(self) -> Callable[[], bool]:
        """Whether the cluster said something since now."""
        seen = self.cluster
        return lambda: self.cluster is not seen

    def waiting_on(self) -> str:
        starts = self.cluster is None or self.cluster.state == ClusterState.STARTING
        why = "" if starts or self.cluster is None else f" ({self.cluster.reason})"
        return f"cluster {self.cluster_id} to be ready{why}"

    def ended(self) -> Outcome | None:
        """What the cluster's end means for the run; None while it does not end. Another cluster follows unless that is
        final."""
        cluster = self.cluster
        if cluster is None or cluster.state not in ENDING:
            return None
        reason = f"cluster {cluster.cluster_id} ended: {cluster.reason}"
        # A cluster that was named can't be replaced, and some would only end the same way.
        final = self._input.cluster_id is not None or cluster.cause in policies.NO_SECOND_CLUSTER
        unrecoverable = cluster.cause in policies.UNRECOVERABLE
        if not final:
            self.cluster, self.cluster_id, self._made = None, None, False
        return Outcome(
            state=RunState.FAILED,
            cause=RunCause.CONFIGURATION if unrecoverable else RunCause.INFRASTRUCTURE,
            reason=reason,
            final=final,
        )

    async def _make(self) -> str | None:
        """After a failure the next run makes the same cluster, with the same id."""
        if self.cluster_id is None:
            self._s.clusters += 1
        self.cluster_id = ids.job_cluster_id(self._input.job_id, self._s.clusters)
        try:
            started: bool = await workflow.execute_activity_method(
                LeaseActivities.start_job_cluster,
                self._own_cluster(self.cluster_id),
                summary=f"start cluster {self._s.clusters} of this job",
                **policies.MESSAGE,
            )
        except ActivityError as error:
            return f"its cluster could not be started: {error.cause or error}"
        self._made, self._s.cancelled = True, not started
        return None

    def _own_cluster(self, cluster_id: str) -> MadeCluster:
        now = workflow.now()
        name = f"job-{self._input.job_id.removeprefix('job_')}-{self._s.clusters}"
        request = ClusterInput(
            cluster_id=cluster_id,
            name=name,
            project_id=self._input.project_id,
            project=self._input.project,
            cloud_id=self._input.cloud_id,
            cloud=self._input.cloud,
            config=self._input.compute_config,
            created_by=self._input.created_by,
            created_at=now,
            tags=self._input.config.tags,
            job_id=self._input.job_id,
            limits=self._input.limits,
        )
        cluster = Cluster(
            id=cluster_id,
            name=name,
            project=self._input.project,
            cloud=self._input.cloud,
            state=ClusterState.STARTING,
            reason="requested by its job",
            compute_config=self._input.compute_config,
            tags=self._input.config.tags,
            created_by=self._input.created_by,
            created_at=now,
            state_since=now,
        )
        return MadeCluster(cluster=cluster, input=request)

    async def acquire(self) -> str | None:
        """The reason when the cluster gave no answer."""
        assert self.cluster_id is not None
        try:
            answer: LeaseAnswer = await workflow.execute_activity_method(
                LeaseActivities.acquire_lease,
                AcquireLease(cluster_id=self.cluster_id, holder=self._input.job_id),
                summary=f"lease cluster {self.cluster_id}",
                **policies.LEASE,
            )
        except ActivityError as error:
            if isinstance(error.cause, ApplicationError) and error.cause.type == "withdrawn":  # words: ok
                self._s.cancelled = True
                return None
            return f"cluster {self.cluster_id} gave no lease: {error.cause or error}"
        self.update(answer)
        return None

    async def release(self) -> None:
        """A cluster of the job's own ends with it."""
        if self.cluster_id is not None:
            own = self._input.cluster_id is None
            release = Release(holder=self._input.job_id, end=own, reason=f"its job {self._s.state}")
            await release_cluster(self.cluster_id, release)
