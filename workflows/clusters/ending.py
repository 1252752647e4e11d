"""Why and how a cluster ends, and each of its machines: deadlines, idleness, leases whose holders have gone.

Machines are ended in batches, by machine id, or by token where a launch's answer was lost; nothing is given up until
the cloud says that they are gone.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from activities.leases import LeaseActivities
    from activities.nodes import EndNodes, HandOver, MachineRefs, NodeActivities
    from heliostat.models.agents import CommandKind
    from heliostat.models.clusters import Activity, ClusterState, NodeState
    from heliostat.models.common import EventLevel
    from runtime.messages.common import TerminateRequest
    from workflows import policies
    from workflows.clusters.progress import ClusterBase
    from workflows.clusters.state import NodeEntry


class ClusterEnds(ClusterBase):
    def _check_deadlines(self, now: datetime) -> None:
        up = self.s.uptime_deadline(self.config)
        if up is not None and now >= up:
            minutes = self.config.maximum_uptime_minutes
            self.s.terminate = TerminateRequest(actor="cluster", reason=f"maximum uptime of {minutes:g} minutes")
        elif self.s.phase_deadline is not None and now >= self.s.phase_deadline:
            self._fail(f"not ready by its deadline; it waited for: {self.s.waits_for or 'its head'}")

    def _check_idle(self, now: datetime) -> None:
        held = bool(self.s.leases) or self.s.activity != Activity.IDLE or self.s.phase != ClusterState.RUNNING
        if held:
            self.s.idle_since = None
        elif self.s.idle_since is None:
            self.s.idle_since = now
        due = self.s.idle_deadline(self.config)
        head = self.s.head
        if due is not None and now >= due and head is not None:
            self.steps.start("idle shutdown", partial(self._idle_shutdown, head))
        check = self._lease_check_due()
        if check is not None and now >= check:
            self.steps.start("lease check", self._check_leases)

    async def _idle_shutdown(self, head: NodeEntry) -> None:
        """Fence first, then ask once more: work that slipped in between is work, and unknown counts as busy."""
        self._fencing = True
        try:
            seen = await self._command(head, CommandKind.FENCE, {}, policies.FENCE_TIMEOUT)
            if self.s.terminate is not None or self.s.head is not head:
                return
            if seen is not None and seen.get("activity") == Activity.IDLE and not self.s.leases:
                minutes = self.config.idle_termination_minutes
                self.s.terminate = TerminateRequest(actor="idle shutdown", reason=f"idle for {minutes:g} minutes")
                return
            await self._command(head, CommandKind.UNFENCE, {}, policies.FENCE_TIMEOUT)
            self.s.idle_since = workflow.now()  # ask again after another idle period
        finally:
            self._fencing = False
            self.recorder.dirty = True  # whoever took a lease meanwhile was told to wait, and is now told to go on

    def _lease_check_due(self) -> datetime | None:
        """A lease held for longer than the idle limit: does its holder's workflow still run?"""
        since = [t for h, t in self.s.leases.items() if not h.startswith("user:")]
        if not since or not self.config.idle_termination_minutes:
            return None
        last = max([min(since), *filter(None, [self.s.leases_checked_at])])
        return last + timedelta(minutes=self.config.idle_termination_minutes)

    async def _check_leases(self) -> None:
        holders = [h for h in self.s.leases if not h.startswith("user:")]
        self.s.leases_checked_at = workflow.now()
        ended: list[str] = await workflow.execute_activity_method(
            LeaseActivities.ended_holders, holders, summary="do the lease holders still run?", **policies.LEASE
        )
        for holder in ended:
            if self.s.leases.pop(holder, None) is not None:
                self.recorder.event("lease_dropped", f"{holder} no longer runs", level=EventLevel.WARNING)

    def _fail(self, reason: str) -> None:
        if self.s.terminate is None:
            self.s.end_state = ClusterState.FAILED
            self.s.cause = self.s.cause or "cluster_failed"
            self.s.terminate = TerminateRequest(actor="cluster", reason=reason)

    def _begin_end(self) -> None:
        assert self.s.terminate is not None
        if self.s.end_state == ClusterState.TERMINATED:
            self.s.cause = "terminated"
        self.s.phase_deadline = None
        self._enter(ClusterState.TERMINATING, self.s.terminate.reason or "asked to end", self.s.terminate.actor)
        self.s.waits_for = "the cloud to confirm that the machines are gone"

    def _give_up(self, node: NodeEntry, reason: str) -> None:
        node.state, node.reason = NodeState.TERMINATING, reason
        self.s.free_slot(node)
        self._touch(node)

    def _unended(self) -> list[NodeEntry]:
        return [n for n in self.s.nodes.values() if n.state != NodeState.TERMINATED]

    def _start_ends(self) -> None:
        """One batch for all that wait; a launch under way is waited for, its machine would be missed."""
        due = []
        for node in self._unended():
            if node.state != NodeState.TERMINATING or node.launching or node.ending:
                continue
            if node.asked:
                due.append(node)
            else:
                self._ended(node)
        if due:
            for node in due:
                node.ending = True
            self.steps.start(f"end {due[0].id}", partial(self._end, due))

    async def _end(self, nodes: list[NodeEntry]) -> None:
        if self.s.terminate is None or self.s.end_state == ClusterState.FAILED:
            silent = [n for n in nodes if n.machine_id and n.registered_at is None and n.launched_at]
            for node in silent[:3]:
                await self._keep_console(node)
        try:
            await workflow.execute_activity_method(
                NodeActivities.end_machines,
                EndNodes(
                    cloud_id=self.input.cloud_id,
                    machine_ids=[n.machine_id for n in nodes if n.machine_id],
                    tokens=[n.token for n in nodes if not n.machine_id],
                ),
                summary=f"end {len(nodes)} machine{'s' * (len(nodes) != 1)} and wait until gone",
                **policies.END_MACHINES,
            )
        except ActivityError:
            for node in nodes:
                node.ending = False
            raise
        for node in nodes:
            self._ended(node)

    async def _keep_console(self, node: NodeEntry) -> None:
        """Why a machine never called is only on its console, and the console goes with the machine."""
        assert node.machine_id is not None
        try:
            text: str = await workflow.execute_activity_method(
                NodeActivities.console_output,
                MachineRefs(cloud_id=self.input.cloud_id, machine_ids=[node.machine_id]),
                summary="keep the console of a node that never called",
                **policies.DESCRIBE,
            )
        except ActivityError as error:
            text = f"(console not readable: {error.cause or error})"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            self.recorder.event("console", text, level=EventLevel.WARNING)
            node.reason = f"{node.reason}; its console ends with: {lines[-1][:200]}"

    def _ended(self, node: NodeEntry) -> None:
        node.state, node.ended_at = NodeState.TERMINATED, workflow.now()
        self._touch(node)

    async def _release(self) -> None:
        self.s.waits_for = "the cloud to delete what its heads have kept"
        self.recorder.dirty = True
        await workflow.execute_activity_method(
            NodeActivities.hand_over,
            HandOver(cloud_id=self.input.cloud_id, cluster_id=self.input.cluster_id),
            summary="delete what the heads have kept",
            **policies.RELEASE_KEPT,
        )
        self.s.keeps = False
