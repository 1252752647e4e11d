"""When a cluster that starts or recovers is ready, and by when it must be."""

from __future__ import annotations

from datetime import datetime

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.clusters import ClusterState, NodeState
    from workflows.clusters.progress import Progress
    from workflows.clusters.state import ClusterData
    from workflows.entity.alarm import Deadline
    from workflows.entity.recorder import Recorder


class Readiness:
    def __init__(self, state: ClusterData, recorder: Recorder, progress: Progress) -> None:
        self._s = state
        self._recorder = recorder
        self._progress = progress

    def check_deadline(self, now: datetime) -> None:
        if self._s.phase_deadline is not None and now >= self._s.phase_deadline:
            waits = self._s.waits_for or "its head"
            self._progress.fail(f"not ready by its deadline; it waited for: {waits}")

    def reconcile(self, now: datetime) -> Deadline | None:
        head = self._s.head
        starting = self._s.phase in (ClusterState.STARTING, ClusterState.RECOVERING)
        if starting and head is not None and head.state == NodeState.RUNNING and self._s.workers_ready():
            marks = {
                "head_launched": head.launched_at or head.registered_at,
                "head_registered": head.registered_at,
                "head_ready": head.running_at,
                "workers_ready": now,
            }
            self._ready(marks)
        else:
            self._progress.set_waiting_on()
        at = self._s.phase_deadline
        return (at, f"deadline of {self._s.phase}") if at is not None else None

    def _ready(self, marks: dict[str, datetime | None]) -> None:
        before = self._s.state_since
        self._s.phase_seconds = {}
        for phase, at in marks.items():
            if at is not None:
                self._s.phase_seconds[phase] = round(max((at - before).total_seconds(), 0), 3)
                before = max(at, before)
        self._s.phase_deadline = None
        self._s.cause = ""
        self._progress.enter(ClusterState.RUNNING, "head and workers are up")
        self._recorder.event("cluster_ready", f"ready after {sum(self._s.phase_seconds.values()):.1f} s")
