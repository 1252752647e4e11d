"""The rows of jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import Event
from heliostat.models.jobs import Job
from runtime.messages.jobs import JobInput
from store.database import Database, insert_new
from store.revisions import insert_events, newer, takes_writes
from store.tables import jobs

_UPDATE_JOB = newer(jobs)


@dataclass(frozen=True)
class JobRow:
    id: str
    project_id: str
    cloud_id: str
    schedule_id: str | None
    started: bool
    withdrawn: bool
    revision: int
    job: Job
    input: JobInput
    """As accepted: whoever starts the workflow starts it with exactly this."""


async def write_job(db: Database, job: Job, events: list[Event]) -> bool:
    """The job with its runs, and what happened. False: there is no such row, or it was withdrawn."""
    async with db.begin() as conn:
        values = {
            "its_id": job.id,
            "its_revision": job.revision,
            "state": job.state,
            "revision": job.revision,
            "doc": job.model_dump(mode="json"),
            "ended_at": job.ended_at,
        }
        wrote = await conn.execute(_UPDATE_JOB, values)
        if not wrote.rowcount and not await takes_writes(conn, jobs, job.id):
            return False
        await insert_events(conn, events)
        return True


async def insert_job(conn: AsyncConnection, job: Job, arg: JobInput, *, started: bool = False) -> bool:
    """Insert-or-ignore by id. Both configs must be masked. ``started``: its workflow is not the outbox's to start.
    False: it was there already."""
    row = {
        "id": job.id,
        "project_id": arg.project_id,
        "cloud_id": arg.cloud_id,
        "name": job.name,
        "state": job.state,
        "revision": job.revision,
        "doc": job.model_dump(mode="json"),
        "input": arg.model_dump(mode="json"),
        "schedule_id": job.schedule_id,
        "started": started,
        "created_at": job.created_at,
    }
    return await insert_new(conn, jobs, row)


async def load_job(db: Database, id: str) -> JobRow | None:
    async with db.read() as conn:
        row = (await conn.execute(select(jobs).where(jobs.c.id == id))).first()
        return _job_row(row) if row else None


def _job_row(r: Row[Any]) -> JobRow:
    return JobRow(
        id=r.id,
        project_id=r.project_id,
        cloud_id=r.cloud_id,
        schedule_id=r.schedule_id,
        started=r.started,
        withdrawn=r.withdrawn,
        revision=r.revision,
        job=Job.model_validate(r.doc),
        input=JobInput.model_validate(r.input),
    )
