"""Retained resources: the volume and the address that each head of the cluster takes over from the one before."""

from __future__ import annotations

import asyncio

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.nodes import HandOver, NodeActivities
    from runtime.messages.clusters import ClusterInput
    from workflows import policies
    from workflows.clusters.nodes import Nodes
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.state import ClusterData, NodeEntry
    from workflows.entity.recorder import Recorder


class RetainedAttachment:
    def __init__(
        self, request: ClusterInput, state: ClusterData, recorder: Recorder, progress: ClusterProgress, nodes: Nodes
    ) -> None:
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress
        self._nodes = nodes

    async def attach(self, node: NodeEntry) -> None:
        """Undo: the machine's end detaches them, ``delete`` deletes them."""
        what = HandOver(cloud_id=self._input.cloud_id, cluster_id=self._input.cluster_id, machine_id=node.machine_id)
        step = workflow.start_activity_method(
            NodeActivities.hand_over,
            what,
            summary=f"attach the retained resources to the head, generation {node.generation}",
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            **policies.HAND_OVER,
        )
        await workflow.wait_condition(lambda: step.done() or not node.live)
        try:
            if not step.done():
                step.cancel()
            await step
        except (ActivityError, asyncio.CancelledError) as error:
            if is_cancelled_exception(error) or not node.live:
                return
            cause = error.__cause__
            why = getattr(cause, "message", cause)
            self._nodes.lose(node, f"its retained resources could not be attached: {why}", failed=True)
            unrecoverable = isinstance(cause, ApplicationError) and cause.type in policies.UNRECOVERABLE
            if unrecoverable and not self._s.ready:
                self._progress.fail(node.reason)

    async def delete(self) -> None:
        self._s.waits_for = "the cloud to delete the retained resources of its heads"
        self._recorder.dirty = True
        await workflow.execute_activity_method(
            NodeActivities.hand_over,
            HandOver(cloud_id=self._input.cloud_id, cluster_id=self._input.cluster_id),
            summary="delete the retained resources",
            **policies.RELEASE_KEPT,
        )
        self._s.keeps = False
