"""Accepted rows whose workflow has not been started yet."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select, update

from heliostat.models.common import utcnow
from store.clusters import ClusterRow, _cluster_row
from store.database import Database
from store.jobs import JobRow, _job_row
from store.revisions import _TABLES, takes_writes
from store.tables import clusters, jobs


async def unstarted(db: Database, older_than_s: float) -> tuple[list[ClusterRow], list[JobRow]]:
    """Accepted clusters and jobs whose workflow is not known to exist, oldest first. ``older_than_s`` leaves
    those alone that the API is about to start itself."""
    before = utcnow() - timedelta(seconds=older_than_s)
    async with db.read() as conn:
        cluster_rows = await conn.execute(
            select(clusters)
            .where(clusters.c.started.is_(False), clusters.c.withdrawn.is_(False), clusters.c.created_at <= before)
            .order_by(clusters.c.id)
            .limit(1000)
        )
        job_rows = await conn.execute(
            select(jobs)
            .where(jobs.c.started.is_(False), jobs.c.withdrawn.is_(False), jobs.c.created_at <= before)
            .order_by(jobs.c.id)
            .limit(1000)
        )
        return [_cluster_row(r) for r in cluster_rows], [_job_row(r) for r in job_rows]


async def mark_started(db: Database, kind: str, id: str) -> None:
    """Its workflow exists. ``kind``: ``cluster`` or ``job``; of a service nothing is noted, its deploys are
    (:func:`store.services.rows.claim_deploy`)."""
    table = _TABLES[kind]
    if "started" not in table.c:
        return
    async with db.begin() as conn:
        await conn.execute(update(table).where(table.c.id == id).values(started=True))


async def is_withdrawn(db: Database, kind: str, id: str) -> bool:
    """True too when there is no such row. ``kind``: ``cluster``, ``job`` or ``service``."""
    async with db.read() as conn:
        return not await takes_writes(conn, _TABLES[kind], id)
