"""VerifyCloudWorkflow: one look at a cloud, by a worker, since the API makes no call to any. It holds no state."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.clouds import CloudActivities
    from heliostat.models.clouds import Check
    from workflows import policies


@workflow.defn
class VerifyCloudWorkflow:
    @workflow.run
    async def run(self, cloud_id: str) -> list[Check]:
        return await workflow.execute_activity_method(
            CloudActivities.verify_cloud, cloud_id, summary="every check of the cloud", **policies.VERIFY_CLOUD
        )
