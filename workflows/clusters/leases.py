"""Who holds the cluster: leases, what their holders are notified of, and whether the holders still run."""

from __future__ import annotations

from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from activities.leases import LeaseActivities
    from heliostat.models.common import EventLevel
    from runtime.messages.clusters import ClusterInput, ClusterNotice, LeaseAnswer, LeaseRequest, Release
    from workflows import policies
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.state import ClusterData
    from workflows.entity.alarm import Deadline
    from workflows.entity.recorder import Recorder
    from workflows.entity.steps import Steps


class Leases:
    def __init__(
        self, request: ClusterInput, state: ClusterData, recorder: Recorder, progress: ClusterProgress, steps: Steps
    ) -> None:
        self.fencing = False
        """The idle shutdown has set its fence: new holders wait until it is decided."""
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress
        self._steps = steps
        # A job that makes a cluster knows that it starts, and one run of the workflow ends only when all are notified.
        self._notified = self._holder_status()

    def acquire(self, request: LeaseRequest) -> bool:
        """Whether this holder is new."""
        if request.holder in self._s.leases:
            return False
        self._s.leases[request.holder] = workflow.now()
        self._recorder.dirty = True
        return True

    def release(self, message: Release) -> None:
        if self._s.leases.pop(message.holder, None) is not None:
            self._recorder.dirty = True
        if message.end and self._input.made_for == message.holder:
            self._progress.terminate(message.reason or "its job has ended", message.holder)

    def answer(self) -> LeaseAnswer:
        head = self._s.head
        return LeaseAnswer(
            cluster_id=self._input.cluster_id,
            state=self._s.phase,
            ready=self._s.ready and not self.fencing and head is not None,
            head_node_id=head.id if head else None,
            head_generation=self._s.head_generation,
            reason=self._s.reason,
            cause=self._s.cause,
            revision=self._s.revision,
            notice=head.notice if head else "",
        )

    def _holder_status(self) -> tuple[object, ...]:
        """What a holder acts on. A new head counts once it can be used, not while its workers are missing."""
        ready = self._s.ready and not self.fencing
        head = self._s.head
        return self._s.phase, ready, self._s.head_generation if ready else None, head.notice if head else ""

    async def notify(self) -> None:
        status = self._holder_status()
        if status == self._notified:
            return
        self._notified = status
        event_id = f"{self._input.cluster_id}/{self._s.revision}"
        notice = ClusterNotice(**self.answer().model_dump(), event_id=event_id)
        for holder in self._workflows():
            try:
                await workflow.get_external_workflow_handle(holder).signal("cluster_changed", notice)
            except ApplicationError as error:
                if error.type == "ExternalWorkflowExecutionNotFound":
                    self._s.leases.pop(holder, None)  # it ended without a release: nobody holds this lease
                    self._recorder.dirty = True
                else:
                    workflow.logger.error("lease holder %s was not notified: %s", holder, error)

    def _workflows(self) -> list[str]:
        """Holders that are workflows."""
        return [h for h in self._s.leases if not h.startswith("user:")]

    def reconcile(self, now: datetime) -> Deadline | None:
        due = self.check_due()
        if due is None:
            return None
        if now >= due:
            self._steps.start("lease check", self._check)
        return due, "check the leases"

    def check_due(self) -> datetime | None:
        """A lease is held for longer than the idle limit: does its holder's workflow still run?"""
        since = [self._s.leases[h] for h in self._workflows()]
        minutes = self._input.config.idle_termination_minutes
        if not since or not minutes:
            return None
        last = max([min(since), *filter(None, [self._s.leases_checked_at])])
        return last + timedelta(minutes=minutes)

    async def _check(self) -> None:
        self._s.leases_checked_at = workflow.now()
        ended: list[str] = await workflow.execute_activity_method(
            LeaseActivities.ended_holders,
            self._workflows(),
            summary="do the lease holders still run?",
            **policies.LEASE,
        )
        for holder in ended:
            if self._s.leases.pop(holder, None) is not None:
                self._recorder.event("lease_dropped", f"{holder} no longer runs", level=EventLevel.WARNING)
