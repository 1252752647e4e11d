"""The end of machines, and of the cluster. Machines are ended in batches, by machine id, or by token where a launch's
answer was lost. Nothing counts as ended until the cloud says that it is gone."""

from __future__ import annotations

from functools import partial

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from activities.nodes import EndNodes, MachineRefs, NodeActivities
    from heliostat.models.clusters import ClusterState, NodeState
    from heliostat.models.common import EventLevel
    from runtime.messages.clusters import ClusterInput
    from workflows import policies
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.retained import RetainedAttachment
    from workflows.clusters.state import ClusterData, NodeEntry
    from workflows.entity.recorder import Recorder
    from workflows.entity.steps import Steps


class Ending:
    def __init__(
        self,
        request: ClusterInput,
        state: ClusterData,
        recorder: Recorder,
        progress: ClusterProgress,
        steps: Steps,
        retained: RetainedAttachment,
    ) -> None:
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress
        self._steps = steps
        self._retained = retained

    def begin(self) -> None:
        """The cluster is to end: no node stays."""
        assert self._s.terminate is not None
        if self._s.phase != ClusterState.TERMINATING:
            if self._s.end_state == ClusterState.TERMINATED:
                self._s.cause = "terminated"
            self._s.phase_deadline = None
            reason = self._s.terminate.reason or "termination requested"
            self._progress.enter(ClusterState.TERMINATING, reason, self._s.terminate.actor)
            self._s.waits_for = "the cloud to confirm that the machines are gone"
        for node in self._s.nodes.values():
            if node.live:
                self._progress.give_up(node, "the cluster ends")

    def reconcile(self) -> None:
        self._end_nodes()
        ending = self._s.phase == ClusterState.TERMINATING
        if not ending or self._unended() or self._steps.running:
            return
        if self._s.keeps:
            self._steps.start("delete the retained resources", self._retained.delete)
        else:
            reason = self._s.terminate.reason if self._s.terminate else ""
            self._progress.enter(self._s.end_state, reason or self._s.reason)

    def _unended(self) -> list[NodeEntry]:
        return [n for n in self._s.nodes.values() if n.state != NodeState.TERMINATED]

    def _end_nodes(self) -> None:
        """One batch for all that are due. A launch in progress is waited for: its machine would be missed."""
        due = []
        for node in self._unended():
            if node.state != NodeState.TERMINATING or node.launching or node.ending:
                continue
            if node.asked:
                due.append(node)
            else:
                self._progress.ended(node)
        if due:
            for node in due:
                node.ending = True
            self._steps.start(f"end {due[0].id}", partial(self._end, due))

    async def _end(self, nodes: list[NodeEntry]) -> None:
        if self._s.terminate is None or self._s.end_state == ClusterState.FAILED:
            silent = [n for n in nodes if n.machine_id and n.registered_at is None and n.launched_at]
            for node in silent[:3]:
                await self._save_console(node)
        try:
            await workflow.execute_activity_method(
                NodeActivities.end_machines,
                EndNodes(
                    cloud_id=self._input.cloud_id,
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
            self._progress.ended(node)

    async def _save_console(self, node: NodeEntry) -> None:
        """Only its console says why a machine never registered, and the console goes with the machine."""
        assert node.machine_id is not None
        try:
            text: str = await workflow.execute_activity_method(
                NodeActivities.console_output,
                MachineRefs(cloud_id=self._input.cloud_id, machine_ids=[node.machine_id]),
                summary="save the console of a node that never registered",
                **policies.DESCRIBE,
            )
        except ActivityError as error:
            text = f"(console not readable: {error.cause or error})"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            self._recorder.event("console", text, level=EventLevel.WARNING)
            node.reason = f"{node.reason}; its console ends with: {lines[-1][:200]}"
