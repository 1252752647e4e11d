"""What the sweep reads: rows that should have a workflow, and clusters that should have an owner. And what it found."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.sql.elements import ColumnElement

from heliostat.models.clusters import ClusterState
from heliostat.models.common import new_id, utcnow
from store.database import Database
from store.tables import clusters, jobs, services, sweeps


async def insert_sweep(db: Database, cloud_id: str, found: int, ended: list[str], seconds: float) -> None:
    """One sweep of a cloud: how many machines it found, and the ids of those that it ended."""
    row = {"id": new_id("sw"), "cloud": cloud_id, "found": found, "ended": ended, "seconds": seconds, "at": utcnow()}
    async with db.begin() as conn:
        await conn.execute(insert(sweeps).values(row))


async def living_clusters(db: Database, created_before: datetime) -> list[str]:
    """Ids of those that have a workflow, or had one."""
    c = clusters.c
    async with db.read() as conn:
        query = select(c.id).where(c.ended_at.is_(None), c.started.is_(True), c.created_at < created_before)
        return list(await conn.scalars(query))


async def living_jobs(db: Database, created_before: datetime) -> list[str]:
    """Ids of those that have a workflow, or had one."""
    c = jobs.c
    async with db.read() as conn:
        query = select(c.id).where(c.ended_at.is_(None), c.started.is_(True), c.created_at < created_before)
        return list(await conn.scalars(query))


async def living_services(db: Database, created_before: datetime) -> list[str]:
    c = services.c
    async with db.read() as conn:
        query = select(c.id).where(c.ended_at.is_(None), c.withdrawn.is_(False), c.created_at < created_before)
        return list(await conn.scalars(query))


async def clusters_of_ended_jobs(db: Database, ended_before: datetime) -> list[tuple[str, str]]:
    """(cluster id, job id) of clusters that live on though the job that they were made for has ended: it was settled
    before it knew of its cluster."""
    async with db.read() as conn:
        rows = await conn.execute(
            select(clusters.c.id, clusters.c.job_id)
            .join(jobs, jobs.c.id == clusters.c.job_id)
            .where(*_lives(), clusters.c.started.is_(True), jobs.c.ended_at < ended_before)
        )
        return [(row.id, row.job_id) for row in rows]


async def clusters_by_service(db: Database, created_before: datetime) -> dict[str, list[str]]:
    """Ids of the living clusters that were made for services. One that ends was released by its service."""
    found: dict[str, list[str]] = {}
    async with db.read() as conn:
        rows = await conn.execute(
            select(clusters.c.id, clusters.c.service_id).where(
                *_lives(), clusters.c.service_id.is_not(None), clusters.c.created_at < created_before
            )
        )
        for row in rows:
            found.setdefault(row.service_id, []).append(row.id)
    return found


async def clusters_of_service(db: Database, service_id: str) -> list[str]:
    """Ids of those that have not ended."""
    async with db.read() as conn:
        query = select(clusters.c.id).where(clusters.c.service_id == service_id, clusters.c.ended_at.is_(None))
        return list(await conn.scalars(query))


def _lives() -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return clusters.c.ended_at.is_(None), clusters.c.state != ClusterState.TERMINATING
