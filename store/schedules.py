"""A schedule's row: the job that each turn starts, frozen when the schedule was applied."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from heliostat.models.common import utcnow
from heliostat.models.jobs import Job, JobState
from runtime.messages.jobs import JobInput
from store.database import Database
from store.tables import clusters, schedules


async def job_of_schedule(db: Database, schedule_id: str, job_id: str) -> tuple[Job, JobInput] | None:
    """The job of one turn, not written down yet; None: there is no such schedule any more. A cluster that the
    schedule names is looked up now: it may be another one of that name than when the schedule was applied."""
    async with db.read() as conn:
        row = (await conn.execute(select(schedules).where(schedules.c.id == schedule_id))).first()
        if row is None:
            return None
        frozen: dict[str, Any] = row.input
        cluster_id = frozen["cluster_id"]
        if cluster_id is not None:
            living = await conn.scalar(
                select(clusters.c.id).where(
                    clusters.c.project_id == row.project_id, clusters.c.live_name == frozen["config"]["cluster"]
                )
            )
            # None lives: the job goes to the one that was meant then, and says that it has ended.
            cluster_id = living or cluster_id
    now = utcnow()
    turn = {"job_id": job_id, "cluster_id": cluster_id, "created_at": now, "schedule_id": schedule_id}
    arg = JobInput.model_validate(frozen | turn)
    job = Job(
        id=job_id,
        name=arg.name,
        project=arg.project,
        state=JobState.STARTING,
        config=arg.config,
        cluster_id=arg.cluster_id,
        created_by=arg.created_by,
        created_at=now,
        state_since=now,
        schedule_id=schedule_id,
        tags=arg.config.tags,
    )
    return job, arg
