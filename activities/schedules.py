"""One run of a schedule: an accepted job, the same as a user's."""

from __future__ import annotations

from temporalio import activity
from temporalio.exceptions import ApplicationError

from heliostat.models.common import Model
from runtime.messages.jobs import JobInput
from store import jobs as job_records
from store.database import Database
from store.schedules import job_of_schedule


class ScheduledTurn(Model):
    schedule_id: str
    job_id: str
    """Derived from the run id of the schedule's workflow, so that a repeated attempt accepts one job."""


class ScheduleActivities:
    def __init__(self, db: Database) -> None:
        self._db = db

    @activity.defn
    async def accept_scheduled_job(self, turn: ScheduledTurn) -> JobInput:
        """Writes the job's row from what ``apply`` resolved and froze; repeatable. Its workflow is started by the
        caller, as a child. Fails for good with type ``not_found`` when the schedule was deleted meanwhile."""
        there = await job_records.load_job(self._db, turn.job_id)
        if there is not None:
            return there.input
        async with self._db.read() as conn:
            found = await job_of_schedule(conn, turn.schedule_id, turn.job_id)
        if found is None:
            raise ApplicationError(f"schedule {turn.schedule_id} was deleted", type="not_found", non_retryable=True)
        job, arg = found
        job.reason = f"started by schedule {turn.schedule_id}"
        async with self._db.begin() as conn:
            # The child's start is as durable as this row. If the monitor started the job, the schedule's workflow could
            # not wait for it as its child. If that workflow is terminated in between, the sweep settles the row.
            await job_records.insert_job(conn, job, arg, started=True)
        return arg
