"""Jobs on a timetable. The timetable is a Temporal Schedule of the row's id; the row holds what each turn runs.

Either side can be made good from the other's loss: the id is derived from project and name, so that applying
again finds what is left in Temporal; and what Temporal has lost is made again from the row (``reconcile``).
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import structlog
from fastapi import APIRouter, Request, Response
from sqlalchemy import Row, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from temporalio import client as temporal
from temporalio.client import ScheduleActionStartWorkflow, ScheduleAlreadyRunningError, ScheduleHandle
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from api.jobs.submit import _repeated as repeated_job
from api.jobs.submit import accept, check, check_packages
from api.kit import lookup
from api.kit.auth import Caller, Me
from api.kit.idempotency import Ordered, earlier
from api.kit.pagination import Cursor, Limit, page
from api.kit.temporal import CALL_S, calling
from api.schedules.cron import parse
from heliostat.errors import HeliostatError, InvalidRequest, NotFound, Unavailable
from heliostat.models.common import Page, new_id, utcnow
from heliostat.models.jobs import Job
from heliostat.models.schedules import Schedule, ScheduleConfig, ScheduleState
from runtime.messages.common import KIND, NAME, PROJECT
from runtime.messages.jobs import ScheduledRunInput
from store.database import insert
from store.encrypted_values import write_sealed
from store.schedules import job_of_schedule
from store.tables import jobs, projects, schedules
from workflows.ids import derived_id

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1/schedules", tags=["schedules"])

LAST_JOBS = 10
RPC = timedelta(seconds=CALL_S)


@router.put("/{name}")
async def apply(request: Request, me: Me, name: str, body: ScheduleConfig) -> Schedule:
    """Creates the schedule of this name, or changes it. A pause stays; jobs that run go on as they were."""
    state = request.app.state
    if body.job_config.name not in (None, name):
        raise InvalidRequest(
            f"The path says {name!r}, the config {body.job_config.name!r}.",
            remedy="Use the same name, or leave job_config.name out.",
            field="job_config.name",
        )
    config = ScheduleConfig.model_validate(
        body.model_dump() | {"job_config": body.job_config.model_dump() | {"name": name}}
    )
    crons = parse(config.cron_expression)
    project = me.project(config.job_config.project, "job_config.project")
    async with state.db.read() as conn:
        try:
            arg = await check(state, conn, me, project, config.job_config, "job_config.")
        except HeliostatError as e:
            if e.field is not None and not e.field.startswith("job_config."):
                e.field = f"job_config.{e.field}"
            raise
    await check_packages(state, project, arg.cloud_id, config.job_config, "job_config.")
    now, id = utcnow(), derived_id("sch", project.id, name)
    values: dict[str, Any] = {
        "config": config.model_copy(update={"job_config": arg.config}).model_dump(mode="json"),
        "input": arg.model_copy(update={"schedule_id": id, "name": name}).model_dump(mode="json"),
        "env_ref": arg.env_ref,
        "updated_at": now,
    }
    async with state.db.begin() as conn:
        if arg.env_ref is not None:
            await write_sealed(conn, state.keys, arg.env_ref, project.id, config.job_config.env_vars)
        before = (await conn.execute(select(schedules).where(schedules.c.id == id))).first()
        row = insert(conn, schedules).values(
            id=id, project_id=project.id, name=name, paused=False, created_by=me.name, created_at=now, **values
        )
        await conn.execute(row.on_conflict_do_update(index_elements=["id"], set_=values))
    try:
        return await _look(state, await _reconcile(state, id, crons))
    except Unavailable:
        if before is None:  # "no" must stay a no: nothing of it may start to fire later
            async with state.db.begin() as conn:
                await conn.execute(delete(schedules).where(schedules.c.id == id, schedules.c.updated_at == now))
        raise


@router.get("")
async def list_all(
    request: Request,
    me: Me,
    name: str | None = None,
    project: str | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Schedule]:
    s, state = schedules.c, request.app.state
    query = select(schedules).where(s.project_id.in_(me.scope(project)))
    query = query.where(s.name == name) if name is not None else query
    async with state.db.read() as conn:
        rows = await page(conn, query, (s.created_at, s.id), lambda r: r, limit, cursor)
    return Page(items=await asyncio.gather(*(_look(state, r) for r in rows.items)), next_cursor=rows.next_cursor)


@router.get("/{ref}")
async def get(request: Request, me: Me, ref: str, project: str | None = None) -> Schedule:
    """``next_trigger_at`` is absent while it is paused, and while Temporal is away."""
    state = request.app.state
    async with state.db.read() as conn:
        row = await _find(conn, me, ref, project)
    return await _look(state, row)


@router.post("/{ref}/pause")
async def pause(request: Request, me: Me, ref: str, project: str | None = None) -> Schedule:
    """No turn is started until it is resumed; turns missed meanwhile are not made up for."""
    return await _set_paused(request, me, ref, project, True)


@router.post("/{ref}/resume")
async def resume(request: Request, me: Me, ref: str, project: str | None = None) -> Schedule:
    return await _set_paused(request, me, ref, project, False)


async def _set_paused(request: Request, me: Caller, ref: str, project: str | None, paused: bool) -> Schedule:
    state = request.app.state
    async with state.db.begin() as conn:
        id = (await _find(conn, me, ref, project)).id
        await conn.execute(update(schedules).where(schedules.c.id == id).values(paused=paused, updated_at=utcnow()))
    return await _look(state, await _reconcile(state, id))


@router.post("/{ref}/run", status_code=201)
async def run(request: Request, me: Me, order: Ordered, ref: str, project: str | None = None) -> Job:
    """One job of it now, beside its timetable and whatever else of it runs."""
    state = request.app.state
    async with state.db.read() as conn:
        row = await _find(conn, me, ref, project)
        before = await earlier(conn, row.project_id, order)
    if before is not None:
        return await repeated_job(state, before)
    found = await job_of_schedule(state.db, row.id, new_id("job"))
    if found is None:
        raise NotFound(f"Schedule {row.name} was deleted meanwhile.", resource=row.id)
    arg = found[1]
    if arg.cluster_id is not None:
        owner = next(p for p in me.projects if p.id == row.project_id)
        async with state.db.read() as conn:
            await lookup.usable_cluster(conn, me, owner, arg.cluster_id)
    return await accept(state, me.actor, order, arg.model_copy(update={"created_by": me.name}), {})


@router.delete("/{ref}", status_code=204)
async def remove(request: Request, me: Me, ref: str, project: str | None = None) -> Response:
    """Its jobs stay, those that run go on."""
    state = request.app.state
    async with state.db.read() as conn:
        id = (await _find(conn, me, ref, project)).id
    try:
        async with calling():
            await _handle(state, id).delete(rpc_timeout=RPC)
    except NotFound:
        pass  # Temporal first, so that a half-done delete leaves a row to delete again, never a timetable without one
    async with state.db.begin() as conn:
        await conn.execute(delete(schedules).where(schedules.c.id == id))
    return Response(status_code=204)


async def _find(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> Row[Any]:
    return await lookup.find(conn, schedules, "schedule", "sch", me, ref, project)


def _handle(state: Any, id: str) -> ScheduleHandle:
    handle: ScheduleHandle = state.temporal.get_schedule_handle(id)
    return handle


async def _look(state: Any, row: Row[Any]) -> Schedule:
    async with state.db.read() as conn:
        mine = select(jobs.c.id).where(jobs.c.schedule_id == row.id, jobs.c.withdrawn.is_(False))
        last = list(await conn.scalars(mine.order_by(jobs.c.created_at.desc()).limit(LAST_JOBS)))
        project = await conn.scalar(select(projects.c.name).where(projects.c.id == row.project_id))
    following: datetime | None = None
    if not row.paused:
        try:
            async with calling():
                times = (await _handle(state, row.id).describe(rpc_timeout=RPC)).info.next_action_times
                following = times[0] if times else None
        except (NotFound, Unavailable):
            log.info("next turn not known", resource=row.id)  # the rest is in the records, and worth an answer
    return Schedule(
        id=row.id,
        name=row.name,
        project=str(project),
        config=ScheduleConfig.model_validate(row.config),
        state=ScheduleState.DISABLED if row.paused else ScheduleState.ENABLED,
        next_trigger_at=following,
        last_jobs=last,
        created_by=row.created_by,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


async def reconcile_all(state: Any) -> None:
    """At start: what Temporal has lost (restored from a backup, another namespace) is made again from the rows."""
    async with state.db.read() as conn:
        ids = list(await conn.scalars(select(schedules.c.id)))
    for id in ids:
        try:
            await _reconcile(state, id, only_if_lost=True)
        except HeliostatError as e:
            log.warning("schedule not checked", resource=id, why=str(e))


async def _reconcile(state: Any, id: str, crons: list[str] | None = None, *, only_if_lost: bool = False) -> Row[Any]:
    """Makes Temporal's schedule what the row says. Repeatable; the row is read anew, so the last writer wins."""
    async with state.db.read() as conn:
        row: Row[Any] | None = (await conn.execute(select(schedules).where(schedules.c.id == id))).first()
    if row is None:
        raise NotFound(f"Schedule {id} was deleted meanwhile.", resource=id)
    wanted = _wanted(state, row, crons)

    async def change(_: temporal.ScheduleUpdateInput) -> temporal.ScheduleUpdate:
        return temporal.ScheduleUpdate(schedule=wanted)

    async with calling():
        try:
            await state.temporal.create_schedule(id, wanted, rpc_timeout=RPC)
        except ScheduleAlreadyRunningError:
            if not only_if_lost:
                await _handle(state, id).update(change, rpc_timeout=RPC)
    return row


def _wanted(state: Any, row: Row[Any], crons: list[str] | None) -> temporal.Schedule:
    config = ScheduleConfig.model_validate(row.config)
    attributes = [
        SearchAttributePair(KIND, "schedule"),
        SearchAttributePair(PROJECT, row.input["project"]),
        SearchAttributePair(NAME, row.name),
    ]
    return temporal.Schedule(
        action=ScheduleActionStartWorkflow(
            "ScheduledRunWorkflow",
            ScheduledRunInput(schedule_id=row.id),
            id=f"{row.id}-turn",
            task_queue=state.settings.task_queue,
            typed_search_attributes=TypedSearchAttributes(attributes),
            static_summary=f"schedule {row.name}: a turn",
        ),
        spec=temporal.ScheduleSpec(
            cron_expressions=crons or parse(config.cron_expression), time_zone_name=config.timezone
        ),
        policy=temporal.SchedulePolicy(
            overlap=temporal.ScheduleOverlapPolicy[config.overlap_policy.name],
            catchup_window=timedelta(seconds=config.catchup_window_s),
        ),
        state=temporal.ScheduleState(paused=row.paused, note=f"{config.cron_expression} {config.timezone}"),
    )
