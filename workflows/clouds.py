"""Calls to a cloud on behalf of the API, which makes none by itself. These workflows hold no state."""

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
            CloudActivities.verify_cloud, cloud_id, summary="all checks of the cloud", **policies.ASK_CLOUD
        )


@workflow.defn
class HeldByCloudWorkflow:
    @workflow.run
    async def run(self, cloud_id: str) -> list[str]:
        return await workflow.execute_activity_method(
            CloudActivities.held_by_cloud,
            cloud_id,
            summary="machines and endpoints of this installation",
            **policies.ASK_CLOUD,
        )
