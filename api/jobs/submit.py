"""Accepts a job: checks it, writes its row, starts its workflow."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from api.compute_configs.resolve import resolve_compute_config
from api.kit import lookup
from api.kit.acceptance import first_event, start, start_again
from api.kit.auth import Caller, Project
from api.kit.checks import check_env, check_tags
from api.kit.idempotency import Order, claim, earlier
from api.kit.limits import limits
from api.storage import packages
from heliostat.errors import InvalidRequest, NotFound
from heliostat.models.common import new_id, utcnow
from heliostat.models.jobs import Job, JobConfig, JobState
from runtime.messages.jobs import JobInput, start_job
from store.encrypted_values import write_sealed
from store.jobs import insert_job, load_job

MAX_ENV_BYTES = 256 * 1024


async def check(
    state: Any, conn: AsyncConnection, me: Caller, project: Project, config: JobConfig, at: str = ""
) -> JobInput:
    """All that the records can tell is right with it, resolved to what its workflow is started with. ``at``: where
    the config stands in the request, for the fields that errors name."""
    check_tags(config.tags, f"{at}tags")
    check_env(config.env_vars, f"{at}env_vars")
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
        shape, cloud = await resolve_compute_config(
            conn, me, project, config.compute_config, config.cloud, offers=state.offers
        )
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
