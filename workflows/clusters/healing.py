"""Nodes that do not come up, or that are lost: deadlines of a boot, heads that are silent or that the cloud takes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.nodes import MachineRefs, NodeActivities
    from clouds.contract.machines import Machine, MachineState
    from heliostat.models.clusters import NodeRole, NodeState
    from runtime.messages.clusters import ClusterInput, HeadSilent
    from workflows import policies
    from workflows.clusters.nodes import Nodes
    from workflows.clusters.state import ClusterData, NodeEntry
    from workflows.entity.alarm import Wakeup
    from workflows.entity.steps import Steps


class Healing:
    def __init__(self, request: ClusterInput, state: ClusterData, steps: Steps, wake: Wakeup, nodes: Nodes) -> None:
        self._input = request
        self._s = state
        self._steps = steps
        self._wake = wake
        self._nodes = nodes

    def reconcile(self, now: datetime) -> None:
        """Its deadlines are read last, see ``deadlines``: other phases give nodes up."""
        for node in list(self._s.nodes.values()):
            due = self._boot_deadline(node)
            if self._is_launched_head(node) and node.taken_at and now >= node.taken_at:
                node.taken_at = None  # a machine that is still there shows itself by its silence
                self.check_silent_head(node, HeadSilent(event_id=f"{node.id}/taken", node_id=node.id, since=now))
            if due is not None and now >= due:
                self._nodes.lose(node, f"{self._overdue(node)} by its deadline ({due:%H:%M:%S} UTC)", failed=True)

    def deadlines(self) -> Iterator[tuple[datetime | None, str]]:
        for node in self._s.nodes.values():
            yield self._boot_deadline(node), f"deadline of {node.label}"
            if self._is_launched_head(node):
                yield node.taken_at, "the head's machine should be gone"

    def _is_launched_head(self, node: NodeEntry) -> bool:
        return node.role == NodeRole.HEAD and node.live and node.machine_id is not None

    def _boot_deadline(self, node: NodeEntry) -> datetime | None:
        """By when the node must be one step further; None while it waits for something else."""
        limits = self._input.limits
        seconds = limits.head_start_timeout_s if node.role == NodeRole.HEAD else limits.worker_start_timeout_s
        if node.state == NodeState.LAUNCHED and node.launched_at:
            return node.launched_at + timedelta(seconds=limits.register_timeout_s or seconds)
        if node.state == NodeState.REGISTERED and node.registered_at:
            if node.role == NodeRole.HEAD:
                return node.registered_at + timedelta(seconds=seconds)
            if self._s.head_running_at:
                return max(node.registered_at, self._s.head_running_at) + timedelta(seconds=seconds)
        return None

    def _overdue(self, node: NodeEntry) -> str:
        """What did not come in time, and which setting is the limit."""
        role = "HEAD" if node.role == NodeRole.HEAD else "WORKER"
        if node.state != NodeState.LAUNCHED:
            return f"did not start Ray after its registration (HELIOSTAT_{role}_START_TIMEOUT_S)"
        limit = "REGISTER" if self._input.limits.register_timeout_s else f"{role}_START"
        return f"did not register after its launch (HELIOSTAT_{limit}_TIMEOUT_S)"

    def check_silent_head(self, head: NodeEntry, message: HeadSilent) -> None:
        self._steps.start("describe the silent head", partial(self._describe_head, head, message))

    async def _describe_head(self, head: NodeEntry, message: HeadSilent) -> None:
        """Silence is not death: the cloud is asked, and a head that runs gets more time."""
        assert head.machine_id is not None
        machines: list[Machine] = await workflow.execute_activity_method(
            NodeActivities.describe_machines,
            MachineRefs(cloud_id=self._input.cloud_id, machine_ids=[head.machine_id]),
            summary="the head is silent: describe its machine",
            **policies.DESCRIBE,
        )
        found = machines[0] if machines else None
        if found is None or found.state in (MachineState.GONE, MachineState.STOPPING):
            self._nodes.lose(head, (found.reason if found else "") or "its machine has ended", failed=False)
        elif head.state != NodeState.RUNNING:
            pass  # it boots: its own deadline limits that
        elif message.silent_s >= policies.HEAD_SILENCE.total_seconds() and not message.mass:
            self._nodes.lose(head, f"silent since {message.since:%H:%M:%S} UTC though its machine runs", failed=False)
        self._wake()
