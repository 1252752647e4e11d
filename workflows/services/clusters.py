"""The clusters of a service: ordinary clusters, each with the service's lease on it from the start."""

from __future__ import annotations

from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from activities.leases import AcquireLease, LeaseActivities, MadeCluster
    from heliostat.models.clusters import Cluster, ClusterState
    from heliostat.models.common import EventLevel
    from runtime.messages.clusters import ClusterInput, LeaseAnswer
    from runtime.messages.services import ServiceInput
    from workflows import ids, policies
    from workflows.services.patches import NOTICES
    from workflows.services.records import ServiceRecords
    from workflows.services.state import LIVING, ServiceData, Slot, VersionData

ENDING = (ClusterState.TERMINATING, ClusterState.TERMINATED, ClusterState.FAILED)


class ServiceClusters:
    def __init__(self, arg: ServiceInput, s: ServiceData, records: ServiceRecords) -> None:
        self._arg = arg
        self._s = s
        self._records = records

    def observe(self, answer: LeaseAnswer) -> None:
        """Takes what a cluster reported, unless it is older than what is known."""
        found = self._s.slot_of(answer.cluster_id)
        if found is None or (answer.revision < found[1].revision and not answer.state.settled):
            return
        version, slot = found
        was_ready = slot.ready
        where = f"{version.spec.name}: cluster {slot.number} ({slot.cluster_id})"
        if answer.notice != slot.notice:
            slot.notice = answer.notice
            if answer.notice and workflow.patched(NOTICES):
                self._records.event("head_notice", f"{where}: {answer.notice}", level=EventLevel.WARNING)
        slot.revision, slot.state, slot.reason, slot.ready = answer.revision, answer.state, answer.reason, answer.ready
        if answer.head_node_id != slot.head_node_id and (answer.ready or answer.head_node_id is None):
            if slot.head_node_id is not None:
                slot.lose_head()
            slot.head_node_id = answer.head_node_id
        if answer.ready:
            slot.failures, slot.not_before = 0, None
        elif was_ready:
            self._records.event("cluster_lost", f"{where} {answer.state}: {answer.reason}", level=EventLevel.WARNING)
        if answer.state in ENDING and version.state in LIVING:
            self._observe_end(slot, answer)
        self._records.touch(version)

    def _observe_end(self, slot: Slot, answer: LeaseAnswer) -> None:
        """Another cluster takes its slot, after a back-off. A config with which no cluster can start fails the
        version."""
        slot.failures += 1
        reason = f"cluster {answer.cluster_id} ended: {answer.reason}"
        slot.lose_cluster()
        slot.reason = reason
        wait = policies.backoff(slot.failures - 1)
        slot.not_before = workflow.now() + wait if wait else None
        if answer.cause in policies.UNRECOVERABLE:
            slot.failed, slot.message = True, reason

    async def start(self, version: VersionData, slot: Slot) -> None:
        """Undo: ``Draining.release``."""
        if not slot.cluster_id:
            self._s.clusters_made += 1
            slot.cluster_id = ids.service_cluster_id(self._arg.service_id, self._arg.revision, self._s.clusters_made)
        now = workflow.now()
        name = f"{self._arg.name[:40]}-{slot.cluster_id[-8:]}"  # never that of a cluster which still terminates
        common: dict[str, Any] = {
            "name": name,
            "project": self._arg.project,
            "cloud": self._arg.cloud,
            "created_by": version.spec.created_by,
            "created_at": now,
            "tags": version.spec.tags,
        }
        request = ClusterInput(
            cluster_id=slot.cluster_id,
            project_id=self._arg.project_id,
            cloud_id=self._arg.cloud_id,
            config=version.spec.compute_config,
            service_id=self._arg.service_id,
            limits=version.spec.limits or self._arg.limits,
            **common,
        )
        cluster = Cluster(
            id=slot.cluster_id,
            state=ClusterState.STARTING,
            reason="requested by its service",
            compute_config=version.spec.compute_config,
            state_since=now,
            **common,
        )
        slot.made, slot.asked_at = True, now  # from here on there may be something to end
        self._records.touch(version)
        try:
            await workflow.execute_activity_method(
                LeaseActivities.start_service_cluster,
                MadeCluster(cluster=cluster, input=request),
                summary=f"start cluster {slot.number} of {version.spec.name}",
                **policies.MESSAGE,
            )
        except ActivityError:
            slot.made = False  # the next try starts the same cluster, with the same id
            slot.failures += 1
            slot.not_before = workflow.now() + policies.backoff(slot.failures)
            raise

    async def check(self, slot: Slot) -> None:
        """It has been silent for long: somebody may have ended its workflow by hand."""
        slot.asked_at = workflow.now()
        answer: LeaseAnswer = await workflow.execute_activity_method(
            LeaseActivities.acquire_lease,
            AcquireLease(cluster_id=slot.cluster_id, holder=self._arg.service_id),
            summary=f"check cluster {slot.cluster_id}",
            **policies.LEASE,
        )
        self.observe(answer)
