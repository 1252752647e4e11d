"""Accepts a job: resolves its config, writes its row, starts its workflow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from api.compute_configs.resolve import resolve_compute_config
from api.kit import lookup
from api.kit.acceptance import accepted_event, deleted_by_retention, ensure_started
from api.kit.callers import Caller, Project
from api.kit.checks import check_env, check_env_size, check_tags
from api.kit.context import Context
from api.kit.limits import limits
from api.storage.packages import check_packages
from heliostat.errors import InvalidRequest
from heliostat.models.common import new_id, utcnow
from heliostat.models.jobs import Job, JobConfig, JobState
from runtime.messages.jobs import JobInput, start_job
from store.acceptance import Kind, cancel_accepted
from store.database import AsyncConnection
from store.encrypted_values import write_sealed
from store.jobs import insert_job, load_job


async def job_input(
    ctx: Context, conn: AsyncConnection, me: Caller, project: Project, config: JobConfig, at: str = ""
) -> JobInput:
    """What the job's workflow is started with. Raises what the records can show to be wrong. ``at``: where the config
    is in the request, for the fields that errors name."""
    check_tags(config.tags, f"{at}tags")
    check_env(config.env_vars, f"{at}env_vars")
    check_env_size(config.env_vars, f"{at}env_vars")
    cluster_id: str | None = None
    if config.cluster is not None:
        if config.compute_config is not None:
            raise InvalidRequest(
                "'cluster' and 'compute_config' are both given, but the cluster has its own compute config.",
                remedy="Leave out one of them.",
                field=f"{at}compute_config",
            )
        row = await lookup.usable_cluster(conn, me, project, config.cluster)
        cloud = await lookup.cloud(conn, me, row.cloud_id)
        if config.cloud is not None and config.cloud not in (cloud.id, cloud.name):
            raise InvalidRequest(
                f"Cluster {row.cluster.name} is in cloud {cloud.name}, not in {config.cloud!r}.",
                remedy="Leave out 'cloud'.",
                field=f"{at}cloud",
            )
        cluster_id, compute_config = row.id, row.cluster.compute_config
    else:
        compute_config, cloud = await resolve_compute_config(
            conn, me, project, config.compute_config, config.cloud, offers=ctx.offers
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
        compute_config=compute_config,
        cluster_id=cluster_id,
        created_by=me.name,
        created_at=utcnow(),
        limits=limits(ctx.settings, cloud),
    )


@dataclass
class NewJob:
    """See ``api.kit.acceptance.Acceptable``."""

    ctx: Context
    project_id: str
    actor: str
    resolve: Callable[[AsyncConnection], Awaitable[JobInput]]
    config: JobConfig | None
    """As the request gives it; None: all of the job is recorded already, as a schedule's is."""
    kind: Kind = field(default="job", init=False)
    arg: JobInput = field(init=False)

    @property
    def id(self) -> str:
        return self.arg.job_id

    async def check(self, conn: AsyncConnection) -> None:
        self.arg = await self.resolve(conn)

    async def check_code(self) -> None:
        if self.config is not None:
            await check_code(self.ctx, self.arg, self.config)

    async def write(self, conn: AsyncConnection) -> None:
        if self.config is not None and self.arg.env_ref is not None:
            await write_sealed(conn, self.ctx.keys, self.arg.env_ref, self.project_id, self.config.env_vars)
        await insert_job(conn, self._job(), self.arg)
        await accepted_event(conn, self.id, self.actor, f"job {self.arg.name} submitted")

    async def start(self) -> None:
        await start_job(self.ctx.temporal, self.ctx.settings.task_queue, self.arg)

    async def cancel(self, conn: AsyncConnection) -> bool:
        return await cancel_accepted(conn, self.kind, self.id)

    async def answer(self) -> Job:
        return self._job()

    async def repeat(self, id: str) -> Job:
        row = await load_job(self.ctx.db, id)
        if row is None:
            raise deleted_by_retention("Job", id)
        if not row.started:
            await ensure_job_started(self.ctx, row.input)
        return row.job

    def _job(self) -> Job:
        arg = self.arg
        return Job(
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


async def check_code(ctx: Context, arg: JobInput, config: JobConfig, at: str = "") -> None:
    """Uploads are in the bucket, URLs are of a kind that nodes can fetch."""
    named = [(f"{at}working_dir", config.working_dir)] if config.working_dir is not None else []
    named += [(f"{at}py_modules.{i}", uri) for i, uri in enumerate(config.py_modules)]
    excludes = f"{at}excludes" if config.excludes else None
    await check_packages(ctx.buckets, arg.project_id, arg.cloud_id, named, "job", excludes)


async def ensure_job_started(ctx: Context, arg: JobInput) -> None:
    await ensure_started(ctx, "job", arg.job_id, start_job(ctx.temporal, ctx.settings.task_queue, arg))
