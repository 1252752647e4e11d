"""Jobs: submit, look, terminate, read the log. Their life is ``workflows/jobs/workflow.py``'s."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.jobs.submit import _repeated, accept, check, check_packages
from api.kit import lookup
from api.kit.acceptance import start_again
from api.kit.auth import Caller, Me
from api.kit.dry_run import PLANNED, DryRun, answer, plan
from api.kit.events import events_of
from api.kit.idempotency import Ordered, earlier, told_once
from api.kit.pagination import Cursor, Limit, Tags, page, state_filter, tag_filter
from api.kit.temporal import UPDATE_S, updating
from api.storage.logs import follow_clusters, job_page
from heliostat.errors import Conflict, NotFound
from heliostat.models.common import Event, Page
from heliostat.models.jobs import Job, JobConfig, JobState, JobTerminate, LogPage
from runtime.messages.common import TerminateRequest
from runtime.messages.jobs import JobHandle, start_job
from store.jobs import load_job
from store.tables import clusters, jobs

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post("", status_code=201, response_model=Job, responses=PLANNED)
async def submit(request: Request, me: Me, order: Ordered, body: JobConfig, dry_run: DryRun = False) -> Job | Response:
    """Submits a job. Accepted is durable; follow its state with GET."""
    state = request.app.state
    project = me.project(body.project)
    if dry_run:
        async with state.db.read() as conn:
            arg = await check(state, conn, me, project, body)
            cloud = await lookup.cloud(conn, me, arg.cloud_id)
        await check_packages(state, project, arg.cloud_id, body)
        return answer(plan(state, "job", body.name, project.name, arg.compute_config, cloud, arg.cluster_id))
    async with state.db.read() as conn:
        before = await earlier(conn, project.id, order)
        if before is None:
            arg = await check(state, conn, me, project, body)
    if before is not None:
        return await _repeated(state, before)
    await check_packages(state, project, arg.cloud_id, body)
    return await accept(state, me.actor, order, arg, body.env_vars)


@router.get("")
async def list_all(
    request: Request,
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
    c = jobs.c
    query = select(c.id, c.created_at, c.doc).where(
        c.project_id.in_(me.scope(project)), c.withdrawn.is_(False), *state_filter(jobs, state), *tag_filter(jobs, tag)
    )
    query = query.where(c.name == name) if name is not None else query
    query = query.where(c.schedule_id == schedule) if schedule is not None else query
    query = query.where(c.created_at > created_after) if created_after else query
    query = query.where(c.created_at < created_before) if created_before else query
    async with request.app.state.db.read() as conn:
        if cluster is not None:
            found = await lookup.find(conn, clusters, "cluster", "cl", me, cluster, project)
            query = query.where(c.doc["cluster_id"].as_string() == found.id)
        jobs_page = await page(conn, query, (c.created_at, c.id), lambda r: Job.model_validate(r.doc), limit, cursor)
        await _say_what_clusters_wait_for(conn, jobs_page.items)
        return jobs_page


@router.get("/{ref}")
async def get(request: Request, me: Me, ref: str, project: str | None = None) -> Job:
    """By id, or by name: then the newest of that name."""
    async with request.app.state.db.read() as conn:
        job = Job.model_validate((await _find(conn, me, ref, project)).doc)
        await _say_what_clusters_wait_for(conn, [job])
        return job


async def _say_what_clusters_wait_for(conn: AsyncConnection, found: list[Job]) -> None:
    """A job that waits for its cluster waits for what that waits for; joined here, where it costs no event."""
    waiting = [job for job in found if job.waits_for and job.cluster_id]
    if not waiting:
        return
    c = clusters.c
    rows = await conn.execute(select(c.id, c.doc).where(c.id.in_({job.cluster_id for job in waiting})))
    what = {r.id: r.doc["waits_for"] for r in rows}
    for job in waiting:
        if text := what.get(job.cluster_id):
            job.waits_for += f"; the cluster waits for {text}"


@router.post("/{ref}/terminate")
async def terminate(
    request: Request, me: Me, order: Ordered, ref: str, body: JobTerminate | None = None, project: str | None = None
) -> Job:
    """Asks for its end, at any moment; answers at once. Ended already is fine."""
    state = request.app.state
    async with state.db.read() as conn:
        found = await _find(conn, me, ref, project)
    id: str = found.id
    await told_once(state.db, found.project_id, order)
    row = await load_job(state.db, id)
    assert row is not None
    if row.job.state.settled:
        return row.job
    if not row.started:
        await start_again(state, "job", id, start_job(state.temporal, state.settings.task_queue, row.input))
    message = TerminateRequest(actor=me.actor, reason=(body or JobTerminate()).reason)
    try:
        async with updating("job", id):
            await JobHandle(state.temporal, id).terminate(message, key=order.key, timeout_s=UPDATE_S)
    except NotFound as e:
        row = await load_job(state.db, id)
        if row is None or not row.job.state.settled:
            raise Conflict(
                f"The workflow of job {id} is gone: somebody ended it in Temporal.",
                remedy="Its cluster ends by itself; nothing else is to be done with it.",
                resource=id,
            ) from e
    row = await load_job(state.db, id)
    assert row is not None
    return row.job


@router.get("/{ref}/events")
async def list_events(
    request: Request, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Event]:
    """Its story, oldest first."""
    async with request.app.state.db.read() as conn:
        return await events_of(conn, (await _find(conn, me, ref, project)).id, limit, cursor)


@router.get("/{ref}/logs")
async def logs(
    request: Request,
    me: Me,
    ref: str,
    run: Annotated[str | None, Query(description="One attempt only: its number or id.")] = None,
    follow: Annotated[bool, Query(description="Somebody reads as it is written: nodes ship every second.")] = False,
    project: str | None = None,
) -> LogPage:
    """Where its log lies, run by run; readable after its cluster is gone."""
    state = request.app.state
    async with state.db.read() as conn:
        row = await _find(conn, me, ref, project)
    cluster_id = row.doc.get("cluster_id")
    if follow and cluster_id and not JobState(row.state).settled:
        await follow_clusters(state.db, [cluster_id])
    return await job_page(state, row, run)


async def _find(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> Row[Any]:
    return await lookup.find(conn, jobs, "job", "job", me, ref, project)
