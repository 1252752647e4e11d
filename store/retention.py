"""Deletes what is older than the retention settings allow. Only what has ended; each call deletes one batch, and may be
repeated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Select, delete, func, select, union_all

from heliostat.models.jobs import Job
from heliostat.models.schedules import ScheduleConfig
from heliostat.models.services import ServiceConfig
from store.database import Database
from store.tables import (
    accepted,
    clusters,
    commands,
    events,
    followers,
    jobs,
    log_streams,
    nodes,
    reports,
    schedules,
    sealed,
    service_deploys,
    service_versions,
    services,
    sweeps,
)

BATCH = 1000

VERSIONS_KEPT = 10
"""The newest ended versions of a service stay as long as it does: it may be rolled back to one of them."""


async def delete_old(db: Database, *, records_before: datetime, events_before: datetime) -> dict[str, int]:
    """Deletes at most BATCH ended clusters and jobs with all that hangs on them, deleted services likewise, and events;
    also env values that nothing alive refers to. A terminated service keeps its name and its tokens until somebody
    deletes it. Rows by table; all zero: nothing is left to do."""
    counts: dict[str, int] = {}

    async with db.begin() as conn:

        async def drop(table: Any, *where: Any) -> None:
            done = await conn.execute(delete(table).where(*where))
            counts[table.name] = counts.get(table.name, 0) + done.rowcount

        async def some(column: Any, *where: Any) -> list[str]:
            return list(await conn.scalars(select(column).where(*where).limit(BATCH)))

        old_clusters = await some(clusters.c.id, clusters.c.ended_at < records_before)
        old_jobs = await some(jobs.c.id, jobs.c.ended_at < records_before)
        withdrawn = [
            *await some(clusters.c.id, clusters.c.withdrawn.is_(True), clusters.c.created_at < records_before),
            *await some(jobs.c.id, jobs.c.withdrawn.is_(True), jobs.c.created_at < records_before),
        ]
        gone = [*old_clusters, *old_jobs, *withdrawn]
        if gone:
            for table in (commands, reports, log_streams, followers, nodes):
                await drop(table, table.c.cluster_id.in_(gone))
            await drop(events, events.c.resource_id.in_(gone))
            await drop(accepted, accepted.c.resource_id.in_(gone))
            await drop(jobs, jobs.c.id.in_(gone))
            await drop(clusters, clusters.c.id.in_(gone))
        await _drop_services(drop, some, records_before)
        await drop(events, events.c.id.in_(await some(events.c.id, events.c.at < events_before)))
        await drop(sweeps, sweeps.c.id.in_(await some(sweeps.c.id, sweeps.c.at < events_before)))
        await drop(commands, commands.c.id.in_(await some(commands.c.id, commands.c.done_at < events_before)))
        env_ref = jobs.c.input["env_ref"].as_string()
        in_use = union_all(
            select(schedules.c.env_ref).where(schedules.c.env_ref.is_not(None)),
            select(env_ref).where(env_ref.is_not(None), jobs.c.ended_at.is_(None), jobs.c.withdrawn.is_(False)),
            _of_living_services(select(service_versions.c.env_ref)).where(service_versions.c.env_ref.is_not(None)),
        )
        await drop(
            sealed,
            sealed.c.id.not_in(in_use),
            sealed.c.id.not_like("qt|_%", escape="|"),  # services' tokens go with their service
            sealed.c.created_at < events_before,
        )
    return counts


async def _drop_services(
    drop: Callable[..., Awaitable[None]], some: Callable[..., Awaitable[list[str]]], before: datetime
) -> None:
    s, v, d = services.c, service_versions.c, service_deploys.c
    if gone := await some(s.id, s.withdrawn.is_(True), s.created_at < before):
        deploys = await some(d.id, d.service_id.in_(gone))
        await drop(accepted, accepted.c.resource_id.in_(deploys))
        await drop(service_deploys, d.id.in_(deploys))
        await drop(service_versions, v.service_id.in_(gone))
        await drop(events, events.c.resource_id.in_(gone))
        left = select(d.service_id).where(d.service_id.in_(gone))  # deploys beyond this batch
        await drop(services, s.id.in_(gone), s.id.not_in(left))
    done = d.started.is_(True) | d.withdrawn.is_(True)
    if old := await some(d.id, d.created_at < before, done):
        await drop(accepted, accepted.c.resource_id.in_(old))
        await drop(service_deploys, d.id.in_(old))
    for prefix in ("qt", "od"):  # tokens, and orders that make nothing
        await drop(accepted, accepted.c.resource_id.like(f"{prefix}|_%", escape="|"), accepted.c.created_at < before)
    newer = service_versions.alias("newer")
    ended_since = (
        select(func.count())
        .where(newer.c.service_id == v.service_id, newer.c.ended_at.is_not(None), newer.c.number > v.number)
        .scalar_subquery()
    )
    await drop(service_versions, v.id.in_(await some(v.id, v.ended_at < before, ended_since >= VERSIONS_KEPT)))


def _of_living_services(query: Select[Any]) -> Select[Any]:
    """Of versions, ended ones included: a service that lives may be rolled back."""
    return query.select_from(service_versions.join(services, services.c.id == service_versions.c.service_id)).where(
        services.c.withdrawn.is_(False), services.c.ended_at.is_(None)
    )


async def logs_before(db: Database, before: datetime) -> list[tuple[str, str]]:
    """(cloud id, cluster id) of clusters that ended before then and whose logs are still there: delete the
    objects under ``logs/<cluster id>/``, then call :func:`forget_logs`."""
    async with db.read() as conn:
        rows = await conn.execute(
            select(clusters.c.cloud_id, clusters.c.id)
            .where(clusters.c.ended_at < before, clusters.c.id.in_(select(log_streams.c.cluster_id)))
            .order_by(clusters.c.id)
            .limit(BATCH)
        )
        return [(r.cloud_id, r.id) for r in rows]


async def forget_logs(db: Database, cluster_ids: list[str]) -> None:
    async with db.begin() as conn:
        await conn.execute(delete(log_streams).where(log_streams.c.cluster_id.in_(cluster_ids)))


async def uploads_in_use(db: Database) -> set[str]:
    """The sha256 of every upload that a job which has not ended, a service that lives, or a schedule still needs."""
    async with db.read() as conn:
        live = await conn.scalars(select(jobs.c.doc).where(jobs.c.ended_at.is_(None), jobs.c.withdrawn.is_(False)))
        served = await conn.scalars(_of_living_services(select(service_versions.c.config)))
        uris = [uri for config in served for _, uri in ServiceConfig.model_validate(config).packages()]
        configs = [Job.model_validate(doc).config for doc in live]
        configs += [ScheduleConfig.model_validate(c).job_config for c in await conn.scalars(select(schedules.c.config))]
    uris += [uri for config in configs for uri in (config.working_dir, *config.py_modules) if uri]
    return {uri.removeprefix("upload:") for uri in uris if uri.startswith("upload:")}
