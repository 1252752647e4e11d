"""ScheduledRunWorkflow: one trigger of a schedule. It lives as long as its job, so that Temporal's overlap policy
applies to the job. Its cancellation (``CANCEL_OTHER``) cancels the job, which stops its run and ends its cluster."""

from __future__ import annotations

from temporalio import workflow
from temporalio.workflow import ParentClosePolicy

with workflow.unsafe.imports_passed_through():
    from activities.schedules import ScheduleActivities, ScheduledTurn
    from heliostat.models.common import derived_id
    from runtime.messages.jobs import JobInput, ScheduledRunInput, job_attributes, job_summary
    from workflows import policies
    from workflows.jobs.workflow import JobWorkflow


@workflow.defn
class ScheduledRunWorkflow:
    @workflow.run
    async def run(self, request: ScheduledRunInput) -> str:
        info = workflow.info()
        job: JobInput = await workflow.execute_activity_method(
            ScheduleActivities.accept_scheduled_job,
            ScheduledTurn(schedule_id=request.schedule_id, job_id=derived_id("job", info.workflow_id, info.run_id)),
            summary="accept the scheduled job",
            **policies.MESSAGE,
        )
        workflow.set_current_details(f"waiting for job `{job.job_id}`")
        result: str = await workflow.execute_child_workflow(
            JobWorkflow.run,
            job,
            id=job.job_id,
            # A person who terminates this workflow must not kill a job that owns a cluster: it continues and cleans up.
            parent_close_policy=ParentClosePolicy.ABANDON,
            search_attributes=job_attributes(job),
            static_summary=job_summary(job),
        )
        return result
