"""The rows of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import Event, utcnow
from heliostat.models.jobs import Job
from runtime.messages.jobs import JobInput
from store.database import Database, insert_new
from store.lookup import Match, find_row
from store.pages import Filters, Found, PageRequest, read_page
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
    """The job with its runs, and what happened. False: there is no such row, or it was cancelled."""
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


async def unstarted_jobs(db: Database, older_than_s: float) -> list[JobRow]:
    """Accepted ones whose workflow is not known to exist, oldest first."""
    c = jobs.c
    query = (
        select(jobs)
        .where(c.started.is_(False), c.withdrawn.is_(False), c.created_at <= utcnow() - timedelta(seconds=older_than_s))
        .order_by(c.id)
        .limit(1000)
    )
    async with db.read() as conn:
        return [_job_row(r) for r in await conn.execute(query)]


async def load_job(db: Database, id: str) -> JobRow | None:
    async with db.read() as conn:
        row = (await conn.execute(select(jobs).where(jobs.c.id == id))).first()
        return _job_row(row) if row else None


async def find_job(conn: AsyncConnection, project_ids: Sequence[str], ref: str) -> Match[JobRow]:
    """By id, or the newest by name."""
    return await find_row(conn, jobs, "job", _job_row, project_ids, ref)


async def list_jobs(
    conn: AsyncConnection, filters: Filters, page: PageRequest, *, schedule_id: str | None, cluster_id: str | None
) -> Found[Job]:
    """Newest first. ``cluster_id``: of their newest run."""
    c = jobs.c
    query = select(c.id, c.created_at, c.doc).where(*filters.of(jobs))
    query = query.where(c.schedule_id == schedule_id) if schedule_id is not None else query
    query = query.where(c.doc["cluster_id"].as_string() == cluster_id) if cluster_id is not None else query
    return await read_page(conn, query, (c.created_at, c.id), lambda r: Job.model_validate(r.doc), page)


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
