"""Jobs: submit, look, terminate, read the log. Their life is ``workflows/jobs.py``'s."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from api import lookup, packages, temporal
from api.accept import Order, Ordered, claim, earlier, first_event, start, start_again, told_once
from api.auth import Caller, Me, Project
from api.clusters import events_of
from api.limits import limits
from api.logs import follow_clusters, job_page
from api.pagination import Cursor, Limit, Tags, page, state_filter, tag_filter
from api.plans import PLANNED, DryRun, answer, plan
from heliostat.errors import Conflict, InvalidRequest, NotFound
from heliostat.models.common import Event, Page, new_id, utcnow
from heliostat.models.jobs import Job, JobConfig, JobState, JobTerminate, LogPage
from runtime.messages import JobInput, TerminateRequest, start_job
from store.projection import insert_job, load_job, write_sealed
from store.tables import clusters, jobs

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

MAX_ENV_BYTES = 256 * 1024


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


async def check(
    state: Any, conn: AsyncConnection, me: Caller, project: Project, config: JobConfig, at: str = ""
) -> JobInput:
    """All that the records can tell is right with it, resolved to what its workflow is started with. ``at``: where
    the config stands in the request, for the fields that errors name."""
    lookup.check_tags(config.tags, f"{at}tags")
    lookup.check_env(config.env_vars, f"{at}env_vars")
    size = sum(len(k) + len(v.encode()) for k, v in config.env_vars.items())
    if size > MAX_ENV_BYTES:
        raise InvalidRequest(
            f"The environment variables have {size} bytes.",
            remedy=f"Keep them below {MAX_ENV_BYTES}; larger things belong into a file.",
            field=f"{at}env_vars",
        )
    cluster_id: str | None = None
    if config.cluster is not None:
        if config.compute_config is not None:
            raise InvalidRequest(
                "Both 'cluster' and 'compute_config' are given: the cluster has its shape already.",
                remedy="Leave out one of them.",
                field=f"{at}compute_config",
            )
        row, cluster = await lookup.usable_cluster(conn, me, project, config.cluster)
        cloud = await lookup.cloud(conn, me, row.cloud_id)
        if config.cloud is not None and config.cloud not in (cloud.id, cloud.name):
            raise InvalidRequest(
                f"Cluster {cluster.name} is in cloud {cloud.name}, not in {config.cloud!r}.",
                remedy="Leave out 'cloud'.",
                field=f"{at}cloud",
            )
        cluster_id, shape = cluster.id, cluster.compute_config
    else:
        shape, cloud = await lookup.shape(conn, me, project, config.compute_config, config.cloud, offers=state.offers)
    id = new_id("job")
    return JobInput(
        job_id=id,
        name=config.name or f"job-{id[-6:]}",
        project_id=project.id,
        project=project.name,
        cloud_id=cloud.id,
        cloud=cloud.name,
        config=config.masked(),
        env_ref=new_id("env") if config.env_vars else None,
        compute_config=shape,
        cluster_id=cluster_id,
        created_by=me.name,
        created_at=utcnow(),
        limits=limits(state.settings, cloud),
    )


async def check_packages(state: Any, project: Project, cloud_id: str, config: JobConfig, at: str = "") -> None:
    """The code that the config names can be there: uploads are in the bucket, URLs are of a kind that nodes fetch."""
    named = [(f"{at}working_dir", config.working_dir)] if config.working_dir is not None else []
    named += [(f"{at}py_modules.{i}", uri) for i, uri in enumerate(config.py_modules)]
    excludes = f"{at}excludes" if config.excludes else None
    await packages.check(state, project.id, cloud_id, named, "job", excludes)


async def accept(state: Any, actor: str, order: Order, arg: JobInput, env_vars: dict[str, str]) -> Job:
    """Writes an accepted job down and starts it. ``env_vars``: sealed under ``arg.env_ref`` if there are any; without,
    ``env_ref`` refers to what is sealed already (a schedule's)."""
    job = Job(
        id=arg.job_id,
        name=arg.name,
        project=arg.project,
        state=JobState.STARTING,
        config=arg.config,
        cluster_id=arg.cluster_id,
        created_by=arg.created_by,
        created_at=arg.created_at,
        state_since=arg.created_at,
        schedule_id=arg.schedule_id,
        tags=arg.config.tags,
    )
    async with state.db.begin() as conn:
        mine = await claim(conn, arg.project_id, order, job.id)
        if mine:
            if env_vars and arg.env_ref is not None:
                await write_sealed(conn, state.keys, arg.env_ref, arg.project_id, env_vars)
            await insert_job(conn, job, arg)
            await first_event(conn, job.id, actor, f"job {job.name} submitted")
        else:
            other = await earlier(conn, arg.project_id, order)
    if not mine:
        assert other is not None
        return await _repeated(state, other)
    await start(state, "job", job.id, arg.project_id, order, start_job(state.temporal, state.settings.task_queue, arg))
    return job


async def _repeated(state: Any, id: str) -> Job:
    row = await load_job(state.db, id)
    if row is None:
        raise NotFound(f"Job {id} is gone by retention.", remedy="Use a new Idempotency-Key.", resource=id)
    if not row.started:
        await start_again(state, "job", id, start_job(state.temporal, state.settings.task_queue, row.input))
    return row.job


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
        await temporal.update(state.temporal, id, "terminate", message, order.key, "job")
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
