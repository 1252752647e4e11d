"""Leases on clusters, as their holders use them."""

from __future__ import annotations

from temporalio import workflow
from temporalio.exceptions import FailureError

with workflow.unsafe.imports_passed_through():
    from activities.leases import LeaseActivities, ReleaseLease
    from runtime.messages.clusters import Release
    from workflows import policies


async def release_cluster(cluster_id: str, release: Release) -> None:
    """Gives the lease back; a cluster created for its holder then ends by itself. Retries for ever: without it,
    the cluster might run for ever."""
    while True:
        try:
            await workflow.execute_local_activity_method(
                LeaseActivities.release_lease,
                ReleaseLease(cluster_id=cluster_id, release=release),
                summary=f"release cluster {cluster_id}",
                **policies.RELEASE,
            )
            return
        except FailureError as error:
            workflow.logger.error("cluster %s can't be released: %s", cluster_id, error.cause or error)
            await workflow.sleep(10, summary="release the cluster again")
