"""Which node ships which log stream, and whose logs somebody follows now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import utcnow
from store.database import insert
from store.tables import followers, log_streams


@dataclass(frozen=True)
class LogStream:
    cluster_id: str
    node_id: str
    stream: str
    job_id: str | None
    complete: bool


async def register_streams(
    conn: AsyncConnection, cluster_id: str, node_id: str, job_by_stream: Mapping[str, str | None]
) -> None:
    """Repeatable. ``job_by_stream``: the job whose log it is; None: the node's own."""
    rows = [
        {
            "cluster_id": cluster_id,
            "node_id": node_id,
            "stream": stream,
            "job_id": job_id,
            "complete": False,
            "created_at": utcnow(),
        }
        for stream, job_id in job_by_stream.items()
    ]
    await conn.execute(insert(conn, log_streams).values(rows).on_conflict_do_nothing())


async def complete_run_log(conn: AsyncConnection, cluster_id: str, node_id: str, run_id: str) -> None:
    await conn.execute(
        update(log_streams)
        .where(
            log_streams.c.cluster_id == cluster_id,
            log_streams.c.node_id == node_id,
            log_streams.c.stream == f"runs/{run_id}.log",
        )
        .values(complete=True)
    )


async def run_streams(conn: AsyncConnection, job_id: str) -> list[LogStream]:
    """Of a job's runs, oldest first."""
    c = log_streams.c
    query = select(log_streams).where(c.job_id == job_id, c.stream.like("runs/%"))
    return [_stream(r) for r in await conn.execute(query.order_by(c.created_at))]


async def node_streams(conn: AsyncConnection, cluster_id: str, node_id: str | None) -> list[LogStream]:
    """The streams of a cluster's nodes (or of one of them) that belong to no run, by node and name."""
    c = log_streams.c
    query = select(log_streams).where(c.cluster_id == cluster_id, c.stream.not_like("runs/%"))
    if node_id is not None:
        query = query.where(c.node_id == node_id)
    return [_stream(r) for r in await conn.execute(query.order_by(c.node_id, c.stream))]


async def replica_streams(conn: AsyncConnection, cluster_ids: list[str]) -> list[LogStream]:
    """What the replicas of a service write (Ray's worker files) and Serve's own logs, in the order of the clusters."""
    c = log_streams.c
    written = or_(c.stream.like("ray/worker-%"), c.stream.like("ray/serve/%"))
    rows = await conn.execute(select(log_streams).where(c.cluster_id.in_(cluster_ids), written))
    return [
        _stream(r) for r in sorted(rows, key=lambda r: (cluster_ids.index(r.cluster_id), r.node_id, r.stream))
    ]  # fmt: skip


async def not_followed_until(conn: AsyncConnection, cluster_ids: Collection[str], until: datetime) -> list[str]:
    """Those of the clusters that nobody follows until then."""
    query = select(followers.c.cluster_id).where(followers.c.cluster_id.in_(cluster_ids), followers.c.until > until)
    followed = set(await conn.scalars(query))
    return [id for id in cluster_ids if id not in followed]


async def follow_until(conn: AsyncConnection, cluster_ids: Collection[str], until: datetime) -> None:
    new = insert(conn, followers).values([{"cluster_id": id, "until": until} for id in cluster_ids])
    await conn.execute(new.on_conflict_do_update(index_elements=["cluster_id"], set_={"until": new.excluded.until}))


def _stream(r: Row[Any]) -> LogStream:
    return LogStream(r.cluster_id, r.node_id, r.stream, r.job_id, r.complete)
