"""What every phase of a cluster does to its state so that others see it: changes of nodes and of the cluster."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.clusters import ClusterState, NodeState
    from heliostat.models.common import EventLevel
    from runtime.messages.common import SYSTEM, TerminateRequest
    from workflows.clusters.state import ClusterData, NodeEntry
    from workflows.entity.alarm import Wakeup
    from workflows.entity.recorder import Recorder


class ClusterProgress:
    def __init__(self, state: ClusterData, recorder: Recorder, wake: Wakeup) -> None:
        self._s = state
        self._recorder = recorder
        self._wake = wake

    def touch(self, node: NodeEntry) -> None:
        """The node changed: write it, and reconcile."""
        self._recorder.touch(node.id)
        self._wake()

    def enter(self, phase: ClusterState, reason: str, actor: str = "") -> None:
        self._s.phase, self._s.reason, self._s.state_since = phase, reason, workflow.now()
        self._s.waits_for = ""
        level = EventLevel.ERROR if phase == ClusterState.FAILED else EventLevel.INFO
        self._recorder.event("state", f"{phase}: {reason}", level=level, actor=actor)

    def set_waiting_on(self) -> None:
        starting = self._s.phase in (ClusterState.STARTING, ClusterState.RECOVERING)
        waits = self._s.waiting_text(workflow.now()) if starting else ""
        if waits != self._s.waits_for:
            self._s.waits_for = waits
            self._recorder.dirty = True

    def give_up(self, node: NodeEntry, reason: str) -> None:
        """Its machine must end, and its slot is free."""
        node.state, node.reason = NodeState.TERMINATING, reason
        self._s.free_slot(node)
        self.touch(node)

    def ended(self, node: NodeEntry) -> None:
        node.state, node.ended_at = NodeState.TERMINATED, workflow.now()
        self.touch(node)

    def terminate(self, reason: str, actor: str = SYSTEM) -> None:
        """The cluster ends; the first reason counts."""
        if self._s.terminate is None:
            self._s.terminate = TerminateRequest(actor=actor, reason=reason)

    def fail(self, reason: str) -> None:
        if self._s.terminate is None:
            self._s.end_state = ClusterState.FAILED
            self._s.cause = self._s.cause or "cluster_failed"
            self.terminate(reason)
