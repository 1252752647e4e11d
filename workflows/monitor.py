"""MonitorWorkflow: one for the installation. It runs one activity, which loops and heartbeats, so that watching a
thousand clusters adds no event to any history."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.monitor.loop import MonitorActivities


@workflow.defn
class MonitorWorkflow:
    @workflow.run
    async def run(self) -> None:
        try:
            await workflow.execute_activity_method(
                MonitorActivities.watch,
                # It never ends. A day limits one attempt; the heartbeat shows that a worker died.
                start_to_close_timeout=timedelta(days=1),
                heartbeat_timeout=timedelta(seconds=20),
                retry_policy=RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=10)),
                summary="find silent heads, and accepted requests that were not started",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
        workflow.continue_as_new()
