"""SweepWorkflow: started by a Temporal Schedule. Compares the resources in the clouds with those that workflows own."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from activities.sweep.machines import MachineSweepActivities
    from activities.sweep.records import RecordSweepActivities
    from activities.sweep.result import SweepResult
    from activities.sweep.retention import RetentionActivities
    from activities.sweep.services import ServiceSweep, ServiceSweepActivities

STEP: dict[str, Any] = {
    # One page of a cloud's machines, and a describe and a query for each old cluster.
    "start_to_close_timeout": timedelta(minutes=10),
    "schedule_to_close_timeout": timedelta(minutes=20),
    "heartbeat_timeout": timedelta(minutes=1),
    "retry_policy": RetryPolicy(maximum_attempts=3),  # the next sweep comes anyway
}


@workflow.defn
class SweepWorkflow:
    @workflow.run
    async def run(self) -> SweepResult:
        clouds: list[str] = await workflow.execute_activity_method(
            MachineSweepActivities.list_clouds, start_to_close_timeout=timedelta(seconds=30), summary="list the clouds"
        )
        swept = await asyncio.gather(
            *(
                workflow.execute_activity_method(
                    MachineSweepActivities.sweep_cloud, cloud, summary=f"machines of {cloud}", **STEP
                )
                for cloud in clouds
            ),
            return_exceptions=True,  # one cloud that is unreachable must not stop the sweep of the others
        )
        settled: SweepResult = await workflow.execute_activity_method(
            RecordSweepActivities.settle_orphans, summary="records without a workflow", **STEP
        )
        services = ServiceSweep()
        if workflow.patched("services"):
            services = await workflow.execute_activity_method(
                ServiceSweepActivities.sweep_services, summary="endpoints and services", **STEP
            )
        failed = [r for r in swept if isinstance(r, BaseException)]
        try:
            await workflow.execute_activity_method(RetentionActivities.apply_retention, summary="retention", **STEP)
        except ActivityError as e:
            failed.append(e)
        total = SweepResult(orphaned=settled.orphaned + services.orphaned, endpoints=services.removed)
        for result in swept:
            if isinstance(result, SweepResult):
                total.machines += result.machines
                total.ended += result.ended
                total.leftovers += result.leftovers
        workflow.set_current_details(
            f"{total.machines} machines seen, {len(total.ended)} ended, {len(total.orphaned)} records settled, "
            f"{len(total.endpoints)} endpoints removed, {len(total.leftovers)} orphaned resources deleted"
            + (f", {len(failed)} clouds unreachable" if failed else "")
        )
        for error in failed:
            if isinstance(error, ActivityError):
                raise error  # the run fails, after the other clouds were swept
        if services.failed:
            raise ApplicationError(f"Endpoints could not be listed in {', '.join(services.failed)}", non_retryable=True)
        return total
