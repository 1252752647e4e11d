"""The life of a node, as its agent and its cloud report it: registered, running, interrupted, lost."""

from __future__ import annotations

from datetime import datetime, timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.clusters import Activity, ClusterState, NodeRole, NodeState
    from heliostat.models.common import EventLevel
    from runtime.messages.clusters import ClusterInput, NodeFact, NodeRegistered
    from workflows import policies
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.state import ClusterData, NodeEntry
    from workflows.entity.recorder import Recorder


class Nodes:
    def __init__(
        self, request: ClusterInput, state: ClusterData, recorder: Recorder, progress: ClusterProgress
    ) -> None:
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress

    def registered(self, node: NodeEntry, message: NodeRegistered) -> None:
        node.ip = message.ip
        self.used_retained(node)
        if node.state in (NodeState.REQUESTED, NodeState.LAUNCHED):
            node.state, node.registered_at = NodeState.REGISTERED, workflow.now()
        self._progress.touch(node)

    def used_retained(self, node: NodeEntry) -> None:
        """What this head wrote to its retained volume is what the next head must find: it goes to the same zone."""
        if node.kept and self._s.kept_in is None:
            self._s.kept_in = node.zone or ""

    def running(self, node: NodeEntry, fact: NodeFact) -> None:
        if node.state == NodeState.RUNNING:
            return
        node.state, node.running_at = NodeState.RUNNING, workflow.now()
        self._s.failures.pop(node.group, None)
        self._s.condition("CapacityAvailable", True, workflow.now())
        if node.role == NodeRole.HEAD:
            self._s.head_running_at = workflow.now()
            self._s.head_generation = node.generation
            self._s.ray_version = str(fact.data.get("ray_version") or "") or self._s.ray_version
            self._s.condition("HeadReady", True, workflow.now())
        self._recorder.event("node_running", f"{node.label} ({node.ip})")
        self._progress.touch(node)

    def interrupted(self, node: NodeEntry, fact: NodeFact) -> None:
        """The cloud will take the machine. A worker's replacement is launched at once. Two heads must never
        live at once: a head's replacement follows when its machine has ended, see ``Healing``."""
        kind, at = str(fact.data.get("kind")), _timestamp(fact.data.get("deadline"))
        if node.taken_at is None:
            node.taken_at = at
        by = f" by {at:%H:%M:%S} UTC" if at else ""
        node.notice = str(fact.data.get("reason") or f"the cloud takes it back{by}")[:300]
        text = f"{node.label}: {node.notice} ({kind})"
        self._recorder.event("spot_notice", text, level=EventLevel.WARNING, actor=f"agent:{fact.node_id}")
        self._progress.touch(node)

    def lose(self, node: NodeEntry, reason: str, *, failed: bool) -> None:
        """The node is lost, or useless: its machine is ended in any case, and its slot is filled again.

        Args:
            failed: it never ran; its group's next launch waits.
        """
        if not node.live:
            return
        self._recorder.event("node_lost", f"{node.label}: {reason}", level=EventLevel.WARNING)
        if node.notice:
            pass  # the cloud has taken it, which says nothing about what runs on it
        elif failed:
            self._s.failures[node.group] = self._s.failures.get(node.group, 0) + 1
        elif node.running_at is not None:
            young = workflow.now() - node.running_at < policies.YOUNG
            self._s.deaths[node.group] = self._s.deaths.get(node.group, 0) + 1 if young else 0
        self._progress.give_up(node, reason)
        if node.role == NodeRole.HEAD:
            self._head_lost(reason)

    def _head_lost(self, reason: str) -> None:
        """All that ran is lost with it: workers of a head without fault tolerance can't join another one."""
        now = workflow.now()
        for worker in self._s.workers():
            self._progress.give_up(worker, "its head is lost")
        self._s.desired, self._s.remove = {}, []
        self._s.activity, self._s.idle_since = Activity.UNKNOWN, None
        self._s.head_running_at = None
        self._s.condition("HeadReady", False, now, "HeadLost", reason)
        if self._s.phase not in (ClusterState.RUNNING, ClusterState.RECOVERING) or self._s.terminate is not None:
            return
        self._s.head_losses = [t for t in self._s.head_losses if now - t < policies.RECOVERIES_WITHIN] + [now]
        if len(self._s.head_losses) > policies.RECOVERIES_MAX:
            minutes = policies.RECOVERIES_WITHIN.total_seconds() / 60
            self._progress.fail(
                f"head lost {len(self._s.head_losses)} times within {minutes:.0f} minutes, last: {reason}"
            )
        elif self._s.phase == ClusterState.RUNNING:
            limits = self._input.limits
            seconds = limits.capacity_timeout_s + policies.longer_boot_s(limits)
            self._s.phase_deadline = now + timedelta(seconds=seconds)
            self._progress.enter(ClusterState.RECOVERING, f"head lost: {reason}")


def _timestamp(value: object) -> datetime | None:
    """A time that a node reported; None where it is not valid."""
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return at if at is not None and at.tzinfo else None
