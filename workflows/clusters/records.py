"""The cluster's records: the cluster, the nodes that changed, their first boot."""

from __future__ import annotations

import asyncio

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.records import ClusterRecord, RecordActivities
    from heliostat.models.clusters import NodeState
    from runtime.messages.clusters import ClusterInput
    from workflows import policies
    from workflows.clusters.leases import Leases
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.state import ClusterData, group_config
    from workflows.clusters.view import cluster_details, cluster_resource, node_resource
    from workflows.entity.recorder import Recorder


class ClusterRecords:
    def __init__(
        self, request: ClusterInput, state: ClusterData, recorder: Recorder, progress: ClusterProgress, leases: Leases
    ) -> None:
        self.cancelled = False
        """The API cancelled the request before anything was created."""
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress
        self._leases = leases

    async def flush(self) -> None:
        """Writes the projection, and notifies the lease holders of what changed for them."""
        self._s.revision += 1
        batch = self._recorder.take(self._s.revision)
        changed = [self._s.nodes[i] for i in batch.changed if i in self._s.nodes]
        ended = [n.id for n in changed if n.state == NodeState.TERMINATED]
        config, bounds = self._input.config, self._s.bounds
        record = ClusterRecord(
            cluster=cluster_resource(self._input, self._s),
            nodes=[node_resource(self._input.cluster_id, n) for n in changed],
            node_configs={
                n.id: {**group_config(config, n.group, bounds.get(n.group)).model_dump(mode="json")}
                for n in changed
                if n.boot is None
            },
            cloud_id=self._input.cloud_id,
            events=batch.events,
        )
        self._recorder.show(self._s.phase, cluster_details(self._input, self._s))
        notified = asyncio.create_task(self._leases.notify())
        try:
            recorded = await self._recorder.write(
                batch,
                workflow.execute_local_activity_method(
                    RecordActivities.record_cluster, record, summary=f"record {self._s.phase}", **policies.RECORD
                ),
            )
        finally:
            await notified
        if recorded is None:
            return
        if not recorded.wanted:
            if not self._s.keeps and not any(n.asked for n in self._s.nodes.values()):
                self.cancelled = True
                return
            # The row no longer exists (the records were restored from an older backup): nobody can reach this cluster.
            self._progress.terminate("the records do not know this cluster")
        for node in changed:
            node.boot = node.boot or recorded.boot
        for node_id in ended:  # not those that ended during the write: the records do not know it yet
            self._s.nodes.pop(node_id, None)
