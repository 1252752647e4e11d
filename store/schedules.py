"""A schedule's row: the job that each turn starts, frozen when the schedule was applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import utcnow
from heliostat.models.jobs import Job, JobState
from heliostat.models.schedules import ScheduleConfig
from runtime.messages.jobs import JobInput
from store.database import insert
from store.lookup import Match, find_row
from store.pages import Found, PageRequest, read_page
from store.tables import clusters, jobs, schedules


@dataclass(frozen=True)
class ScheduleRow:
    id: str
    project_id: str
    project: str
    name: str
    config: ScheduleConfig
    paused: bool
    created_by: str
    created_at: datetime
    updated_at: datetime


async def job_of_schedule(conn: AsyncConnection, schedule_id: str, job_id: str) -> tuple[Job, JobInput] | None:
    """The job of one turn, not written yet; None: the schedule has been deleted. A cluster that the schedule names is
    looked up now: it may be another one of that name than when the schedule was applied."""
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
        # None is alive: the job goes to the one that was meant then, and says that it has ended.
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


async def write_schedule(
    conn: AsyncConnection, id: str, name: str, config: ScheduleConfig, arg: JobInput, created_by: str, now: datetime
) -> bool:
    """Creates the schedule, or changes it: a pause stays. ``arg``: the job of a turn. False: it was there already."""
    existed = await conn.scalar(select(schedules.c.id).where(schedules.c.id == id)) is not None
    values = {
        "config": config.model_dump(mode="json"),
        "input": arg.model_dump(mode="json"),
        "env_ref": arg.env_ref,
        "updated_at": now,
    }
    row = insert(conn, schedules).values(
        id=id, project_id=arg.project_id, name=name, paused=False, created_by=created_by, created_at=now, **values
    )
    await conn.execute(row.on_conflict_do_update(index_elements=["id"], set_=values))
    return not existed


async def set_paused(conn: AsyncConnection, id: str, paused: bool) -> None:
    await conn.execute(update(schedules).where(schedules.c.id == id).values(paused=paused, updated_at=utcnow()))


async def delete_schedule(conn: AsyncConnection, id: str, updated_at: datetime | None = None) -> None:
    """``updated_at``: only as it was written then."""
    same = [schedules.c.updated_at == updated_at] if updated_at is not None else []
    await conn.execute(delete(schedules).where(schedules.c.id == id, *same))


async def load_schedule(conn: AsyncConnection, id: str) -> ScheduleRow | None:
    row = (await conn.execute(select(schedules).where(schedules.c.id == id))).first()
    return _schedule_row(row) if row is not None else None


async def find_schedule(conn: AsyncConnection, project_ids: Sequence[str], ref: str) -> Match[ScheduleRow]:
    """By id or name."""
    return await find_row(conn, schedules, "sch", _schedule_row, project_ids, ref)


async def list_schedules(
    conn: AsyncConnection, project_ids: Sequence[str], name: str | None, page: PageRequest
) -> Found[ScheduleRow]:
    """Newest first."""
    s = schedules.c
    query = select(schedules).where(s.project_id.in_(project_ids))
    query = query.where(s.name == name) if name is not None else query
    return await read_page(conn, query, (s.created_at, s.id), _schedule_row, page)


async def schedule_ids(conn: AsyncConnection) -> list[str]:
    return list(await conn.scalars(select(schedules.c.id)))


async def last_jobs(conn: AsyncConnection, schedule_id: str, limit: int) -> list[str]:
    """Ids of the newest jobs that it started, newest first."""
    mine = select(jobs.c.id).where(jobs.c.schedule_id == schedule_id, jobs.c.withdrawn.is_(False))
    return list(await conn.scalars(mine.order_by(jobs.c.created_at.desc()).limit(limit)))


def _schedule_row(r: Row[Any]) -> ScheduleRow:
    return ScheduleRow(
        id=r.id,
        project_id=r.project_id,
        name=r.name,
        project=r.input["project"],
        config=ScheduleConfig.model_validate(r.config),
        paused=r.paused,
        created_by=r.created_by,
        created_at=r.created_at,
        updated_at=r.updated_at,
    )
