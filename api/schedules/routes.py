"""Jobs on a schedule, which is a Temporal Schedule whose id is the row's; the row holds the job of each turn.

Either side can be restored from the other: the id is derived from project and name, so that applying the schedule again
finds what is left in Temporal; and what Temporal has lost is created again from the row (``_reconcile``).
"""

from __future__ import annotations

import asyncio
from datetime import datetime

import structlog
from fastapi import APIRouter, Response

from api.jobs.submit import NewJob, check_code, job_input
from api.kit import lookup
from api.kit.acceptance import accept
from api.kit.auth import Me
from api.kit.callers import Caller
from api.kit.context import Context, Ctx
from api.kit.idempotency import Key
from api.kit.listing import Cursor, Limit, list_page
from api.schedules import timetable
from api.schedules.cron import parse
from heliostat.errors import HeliostatError, InvalidRequest, NotFound, Unavailable
from heliostat.models.common import Page, derived_id, new_id, utcnow
from heliostat.models.jobs import Job
from heliostat.models.schedules import Schedule, ScheduleConfig, ScheduleState
from runtime.messages.jobs import JobInput
from store import schedules as store
from store.database import AsyncConnection
from store.encrypted_values import write_sealed
from store.pages import Found, PageRequest
from store.schedules import ScheduleRow, job_of_schedule

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1/schedules", tags=["schedules"])

LAST_JOBS = 10


@router.put("/{name}")
async def apply(ctx: Ctx, me: Me, name: str, body: ScheduleConfig) -> Schedule:
    """Creates the schedule of this name, or changes it. A pause stays; running jobs keep running as they are."""
    if body.job_config.name not in (None, name):
        raise InvalidRequest(
            f"The path names {name!r}, the config {body.job_config.name!r}.",
            remedy="Use the same name, or leave out job_config.name.",
            field="job_config.name",
        )
    config = ScheduleConfig.model_validate(
        body.model_dump() | {"job_config": body.job_config.model_dump() | {"name": name}}
    )
    crons = parse(config.cron_expression)
    project = me.project(config.job_config.project, "job_config.project")
    async with ctx.db.read() as conn:
        try:
            arg = await job_input(ctx, conn, me, project, config.job_config, "job_config.")
        except HeliostatError as e:
            if e.field is not None and not e.field.startswith("job_config."):
                e.field = f"job_config.{e.field}"
            raise
    await check_code(ctx, arg, config.job_config, "job_config.")
    now, id = utcnow(), derived_id("sch", project.id, name)
    masked = config.model_copy(update={"job_config": arg.config})
    turn = arg.model_copy(update={"schedule_id": id, "name": name})
    async with ctx.db.begin() as conn:
        if arg.env_ref is not None:
            await write_sealed(conn, ctx.keys, arg.env_ref, project.id, config.job_config.env_vars)
        created = await store.write_schedule(conn, id, name, masked, turn, me.name, now)
    try:
        return await _answer(ctx, await _reconcile(ctx, id, crons))
    except Unavailable:
        if created:  # a refusal must stay a refusal: nothing of it may start to fire later
            async with ctx.db.begin() as conn:
                await store.delete_schedule(conn, id, updated_at=now)
        raise


@router.get("")
async def list_all(
    ctx: Ctx,
    me: Me,
    name: str | None = None,
    project: str | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Schedule]:
    scope = me.scope(project)

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[ScheduleRow]:
        return await store.list_schedules(conn, scope, name, page)

    rows = await list_page(ctx, find, limit, cursor)
    return Page(items=await asyncio.gather(*(_answer(ctx, r) for r in rows.items)), next_cursor=rows.next_cursor)


@router.get("/{ref}")
async def get(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> Schedule:
    """``next_trigger_at`` is absent while it is paused, and while Temporal is unreachable."""
    async with ctx.db.read() as conn:
        row = await lookup.schedule(conn, me, ref, project)
    return await _answer(ctx, row)


@router.post("/{ref}/pause")
async def pause(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> Schedule:
    """No turn starts until it is resumed; turns that are missed meanwhile are skipped."""
    return await _set_paused(ctx, me, ref, project, True)


@router.post("/{ref}/resume")
async def resume(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> Schedule:
    return await _set_paused(ctx, me, ref, project, False)


async def _set_paused(ctx: Context, me: Caller, ref: str, project: str | None, paused: bool) -> Schedule:
    async with ctx.db.begin() as conn:
        id = (await lookup.schedule(conn, me, ref, project)).id
        await store.set_paused(conn, id, paused)
    return await _answer(ctx, await _reconcile(ctx, id))


@router.post("/{ref}/run", status_code=201)
async def run(ctx: Ctx, me: Me, key: Key, ref: str, project: str | None = None) -> Job:
    """Starts one job of the schedule now, in addition to its scheduled and running jobs."""
    async with ctx.db.read() as conn:
        row = await lookup.schedule(conn, me, ref, project)

    async def resolve(conn: AsyncConnection) -> JobInput:
        found = await job_of_schedule(conn, row.id, new_id("job"))
        if found is None:
            raise _deleted(row.name)
        _, arg = found
        if arg.cluster_id is not None:
            owner = next(p for p in me.projects if p.id == row.project_id)
            await lookup.usable_cluster(conn, me, owner, arg.cluster_id)
        return arg.model_copy(update={"created_by": me.name})

    return await accept(ctx, key, NewJob(ctx, row.project_id, me.actor, resolve, None))


@router.delete("/{ref}", status_code=204)
async def remove(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> Response:
    """Its jobs stay; running ones keep running."""
    async with ctx.db.read() as conn:
        id = (await lookup.schedule(conn, me, ref, project)).id
    # Temporal first: a deletion that fails halfway leaves a row to delete again, never the opposite.
    await timetable.delete(ctx.temporal, id)
    async with ctx.db.begin() as conn:
        await store.delete_schedule(conn, id)
    return Response(status_code=204)


async def _answer(ctx: Context, row: ScheduleRow) -> Schedule:
    async with ctx.db.read() as conn:
        last = await store.last_jobs(conn, row.id, LAST_JOBS)
    following: datetime | None = None
    if not row.paused:
        try:
            following = await timetable.next_time(ctx.temporal, row.id)
        except (NotFound, Unavailable):
            log.info("next turn is unknown", resource=row.id)  # the rest is in the records, and worth an answer
    return Schedule(
        id=row.id,
        name=row.name,
        project=row.project,
        config=row.config,
        state=ScheduleState.DISABLED if row.paused else ScheduleState.ENABLED,
        next_trigger_at=following,
        last_jobs=last,
        created_by=row.created_by,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


async def reconcile_all(ctx: Context) -> None:
    """At start: what Temporal has lost (restored from a backup, another namespace) is created again from the rows."""
    async with ctx.db.read() as conn:
        ids = await store.schedule_ids(conn)
    for id in ids:
        try:
            await _reconcile(ctx, id, only_if_lost=True)
        except HeliostatError as e:
            log.warning("schedule is not checked", resource=id, why=str(e))


async def _reconcile(
    ctx: Context, id: str, crons: list[str] | None = None, *, only_if_lost: bool = False
) -> ScheduleRow:
    """Makes Temporal's schedule what the row says. Repeatable; the row is read again, so the last writer wins."""
    async with ctx.db.read() as conn:
        row = await store.load_schedule(conn, id)
    if row is None:
        raise _deleted(id)
    await timetable.put(ctx.temporal, ctx.settings.task_queue, row, crons, only_if_lost=only_if_lost)
    return row


def _deleted(ref: str) -> NotFound:
    return NotFound(f"Schedule {ref} was deleted meanwhile.", resource=ref)
