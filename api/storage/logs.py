"""Where logs lie: presigned URLs of the bucket's chunks. No log byte passes through here, and no node is asked."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, or_, select

from api.storage.buckets import bucket_of, in_bucket
from clouds.contract.bucket import Bucket, StoredObject
from heliostat.models.clusters import Cluster
from heliostat.models.common import utcnow
from heliostat.models.jobs import Job, LogChunk, LogPage
from store.database import Database, insert
from store.tables import followers, log_streams

URL_S = 3600
"""How long a log's URL can be read; a reader asks for new ones at every page anyway."""

FOLLOW_S = 10
"""A reader that follows comes back sooner than this."""

LATE_S = 30
"""A node that died may never finish its log: so long after the end, what there is counts as all."""


async def job_page(state: Any, row: Row[Any], run: str | None) -> LogPage:
    """The chunks of a job's runs, run by run. ``run``: one of them, by number or id. ``complete`` is decided before
    the bucket is listed, so that a complete page misses nothing."""
    job = Job.model_validate(row.doc)
    query = select(log_streams).where(log_streams.c.job_id == row.id, log_streams.c.stream.like("runs/%"))
    async with state.db.read() as conn:
        found = (await conn.execute(query.order_by(log_streams.c.created_at))).all()
    late = job.ended_at is not None and (utcnow() - job.ended_at).total_seconds() > LATE_S
    complete = job.state.settled and (late or all(s.complete for s in found))
    streams = [(s, s.stream.removeprefix("runs/").removesuffix(".log")) for s in found]
    if run is not None:
        streams = [(s, id) for s, id in streams if run in (id, id.rpartition("-")[2])]
    streams.sort(key=lambda pair: int(pair[1].rpartition("-")[2]))
    return LogPage(chunks=await _chunks(await bucket_of(state.buckets, row.cloud_id), streams), complete=complete)


async def cluster_page(state: Any, row: Row[Any], node: str | None) -> LogPage:
    """The chunks of what a cluster's nodes wrote beside their runs."""
    cluster = Cluster.model_validate(row.doc)
    query = select(log_streams).where(log_streams.c.cluster_id == row.id, log_streams.c.stream.not_like("runs/%"))
    if node is not None:
        query = query.where(log_streams.c.node_id == node)
    async with state.db.read() as conn:
        found = (await conn.execute(query.order_by(log_streams.c.node_id, log_streams.c.stream))).all()
    late = cluster.ended_at is not None and (utcnow() - cluster.ended_at).total_seconds() > LATE_S
    chunks = await _chunks(await bucket_of(state.buckets, row.cloud_id), [(s, None) for s in found])
    return LogPage(chunks=chunks, complete=cluster.state.settled and late)


async def service_page(state: Any, cloud_id: str, cluster_ids: list[str], ended_at: datetime | None) -> LogPage:
    """The chunks of what replicas wrote (Ray's worker files) and of Serve's own logs, on these clusters, in the order
    of their making. ``ended_at``: of the service or version whose clusters they are."""
    c = log_streams.c
    late = ended_at is not None and (utcnow() - ended_at).total_seconds() > LATE_S
    written = or_(c.stream.like("ray/worker-%"), c.stream.like("ray/serve/%"))
    async with state.db.read() as conn:
        rows = await conn.execute(select(log_streams).where(c.cluster_id.in_(cluster_ids), written))
        found = sorted(rows, key=lambda r: (cluster_ids.index(r.cluster_id), r.node_id, r.stream))
    return LogPage(
        chunks=await _chunks(await bucket_of(state.buckets, cloud_id), [(s, None) for s in found]), complete=late
    )


async def _chunks(bucket: Bucket, streams: Iterable[tuple[Row[Any], str | None]]) -> list[LogChunk]:
    def look() -> list[LogChunk]:
        chunks = []
        for stream, run_id in streams:
            prefix = f"logs/{stream.cluster_id}/{stream.node_id}/{stream.stream}/"
            name = f"{stream.node_id}/{stream.stream}"
            chunks += [_chunk(bucket, prefix, name, run_id, o) for o in bucket.list(prefix)]
        return chunks

    return await in_bucket(look)


def _chunk(bucket: Bucket, prefix: str, stream: str, run_id: str | None, found: StoredObject) -> LogChunk:
    return LogChunk(
        stream=stream,
        run_id=run_id,
        offset=int(found.key.removeprefix(prefix)),
        size=found.size,
        url=bucket.presign_get(found.key, URL_S),
    )


async def follow_clusters(db: Database, cluster_ids: list[str]) -> None:
    """Somebody reads now: the clusters' agents ship every second for a while. Written at most every few seconds."""
    until = utcnow() + timedelta(seconds=FOLLOW_S)
    async with db.read() as conn:
        enough = followers.c.until > until - timedelta(seconds=FOLLOW_S / 2)
        known = set(
            await conn.scalars(select(followers.c.cluster_id).where(followers.c.cluster_id.in_(cluster_ids), enough))
        )
    rows = [{"cluster_id": id, "until": until} for id in cluster_ids if id not in known]
    if rows:
        async with db.begin() as conn:
            new = insert(conn, followers).values(rows)
            await conn.execute(
                new.on_conflict_do_update(index_elements=["cluster_id"], set_={"until": new.excluded.until})
            )
