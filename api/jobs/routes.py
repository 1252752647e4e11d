"""Jobs: submit, get, list, terminate, read the log. Their life is in ``workflows/jobs/workflow.py``."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Response

from api.jobs.submit import NewJob, check_code, ensure_job_started, job_input
from api.kit import lookup
from api.kit.acceptance import accept
from api.kit.auth import Me
from api.kit.callers import Caller
from api.kit.commands import Target, command
from api.kit.context import Context, Ctx
from api.kit.dry_run import PLANNED, DryRun, answer, plan
from api.kit.idempotency import Key
from api.kit.listing import Cursor, Limit, Tags, events_page, list_page, parse_tags
from api.kit.temporal import UPDATE_S
from api.storage.logs import follow_clusters, job_page
from heliostat.models.common import Event, Page
from heliostat.models.jobs import Job, JobConfig, JobState, JobTerminate, LogPage
from runtime.messages.common import TerminateRequest
from runtime.messages.jobs import JobHandle
from store.clusters import waiting_for
from store.database import AsyncConnection
from store.jobs import JobRow, list_jobs, load_job
from store.pages import Filters, Found, PageRequest

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post("", status_code=201, response_model=Job, responses=PLANNED)
async def submit(ctx: Ctx, me: Me, key: Key, body: JobConfig, dry_run: DryRun = False) -> Job | Response:
    """Submits a job. An accepted job is durable; follow its state with GET."""
    project = me.project(body.project)
    if dry_run:
        async with ctx.db.read() as conn:
            arg = await job_input(ctx, conn, me, project, body)
            cloud = await lookup.cloud(conn, me, arg.cloud_id)
        await check_code(ctx, arg, body)
        return answer(plan(ctx, "job", body.name, project.name, arg.compute_config, cloud, arg.cluster_id))
    resolve = partial(job_input, ctx, me=me, project=project, config=body)
    return await accept(ctx, key, NewJob(ctx, project.id, me.actor, resolve, body))


@router.get("")
async def list_all(
    ctx: Ctx,
    me: Me,
    state: Annotated[list[JobState], Query()] = [],  # noqa: B006  FastAPI copies it
    name: str | None = None,
    project: str | None = None,
    cluster: Annotated[str | None, Query(description="Jobs whose newest run is on this cluster.")] = None,
    schedule: Annotated[str | None, Query(description="Id of the schedule that started them.")] = None,
    tag: Tags = [],  # noqa: B006
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Job]:
    filters = Filters(me.scope(project), state, name, parse_tags(tag), created_after, created_before)

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[Job]:
        on = (await lookup.cluster(conn, me, cluster, project)).id if cluster is not None else None
        found = await list_jobs(conn, filters, page, schedule_id=schedule, cluster_id=on)
        await _add_what_clusters_wait_for(conn, found.items)
        return found

    return await list_page(ctx, find, limit, cursor)


@router.get("/{ref}")
async def get(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> Job:
    """By id, or by name: then the newest of that name."""
    async with ctx.db.read() as conn:
        job = (await lookup.job(conn, me, ref, project)).job
        await _add_what_clusters_wait_for(conn, [job])
        return job


async def _add_what_clusters_wait_for(conn: AsyncConnection, found: list[Job]) -> None:
    """A job that waits for its cluster waits for what that waits for; joined here, where it costs no event."""
    waiting = [(job, job.cluster_id) for job in found if job.waits_for and job.cluster_id]
    if not waiting:
        return
    causes = await waiting_for(conn, {cluster_id for _, cluster_id in waiting})
    for job, cluster_id in waiting:
        if cause := causes.get(cluster_id):
            job.waits_for += f"; the cluster waits for {cause}"


@router.post("/{ref}/terminate")
async def terminate(
    ctx: Ctx, me: Me, key: Key, ref: str, body: JobTerminate | None = None, project: str | None = None
) -> Job:
    """Requests its end, at any moment; answers at once. A job that has ended already is fine."""
    async with ctx.db.read() as conn:
        row = await lookup.job(conn, me, ref, project)
    message = TerminateRequest(actor=me.actor, reason=(body or JobTerminate()).reason)

    async def update() -> None:
        await JobHandle(ctx.temporal, row.id).terminate(message, key=key.key, timeout_s=UPDATE_S)

    await command(ctx, _target(ctx, row), update, key, may_have_ended=True)
    return (await _load(ctx, row.id)).job


def _target(ctx: Context, row: JobRow) -> Target:
    async def start() -> None:
        if not row.started:
            await ensure_job_started(ctx, row.input)

    async def reload() -> Target:
        return _target(ctx, await _load(ctx, row.id))

    return Target(
        noun="job",
        id=row.id,
        name=row.job.name,
        project_id=row.project_id,
        state=row.job.state,
        ended=row.job.state.settled,
        after_end="Submit it again.",
        if_gone="Its cluster ends by itself; nothing else is left to do.",
        ensure_started=start,
        reload=reload,
    )


async def _load(ctx: Context, id: str) -> JobRow:
    row = await load_job(ctx.db, id)
    assert row is not None
    return row


@router.get("/{ref}/events")
async def list_events(
    ctx: Ctx, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Event]:
    """Its events, oldest first."""
    return await events_page(ctx, partial(_id, me=me, ref=ref, project=project), limit, cursor)


@router.get("/{ref}/logs")
async def logs(
    ctx: Ctx,
    me: Me,
    ref: str,
    run: Annotated[str | None, Query(description="One attempt only: its number or id.")] = None,
    follow: Annotated[bool, Query(description="Somebody reads as it is written: nodes ship every second.")] = False,
    project: str | None = None,
) -> LogPage:
    """Where its log is stored, run by run; readable after its cluster has ended."""
    async with ctx.db.read() as conn:
        row = await lookup.job(conn, me, ref, project)
    if follow and row.job.cluster_id and not row.job.state.settled:
        await follow_clusters(ctx.db, [row.job.cluster_id])
    return await job_page(ctx, row, run)


async def _id(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> str:
    return (await lookup.job(conn, me, ref, project)).id
