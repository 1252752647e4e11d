"""Where logs are stored: presigned URLs of the bucket's chunks. No log byte passes through here; no node is called."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from api.kit.context import Context
from api.storage.buckets import bucket_of, in_bucket
from clouds.contract.bucket import Bucket, StoredObject
from heliostat.models.common import utcnow
from heliostat.models.jobs import LogChunk, LogPage
from store.clusters import ClusterRow
from store.database import Database
from store.jobs import JobRow
from store.log_streams import (
    LogStream,
    follow_until,
    node_streams,
    not_followed_until,
    replica_streams,
    run_streams,
)

URL_S = 3600
"""How long a log's URL is valid; a reader gets new ones with every page anyway."""

FOLLOW_S = 10
"""A reader that follows asks again sooner than this."""

LATE_S = 30
"""A node that died may never complete its log: so long after the end, what is there counts as all."""


async def job_page(ctx: Context, row: JobRow, run: str | None) -> LogPage:
    """The chunks of a job's runs, run by run. ``run``: one of them, by number or id. ``complete`` is decided before
    the bucket is listed, so that a complete page misses nothing."""
    async with ctx.db.read() as conn:
        found = await run_streams(conn, row.id)
    complete = row.job.state.settled and (_late(row.job.ended_at) or all(s.complete for s in found))
    streams: list[tuple[LogStream, str | None]] = []
    for id, s in sorted(((_run_id(s), s) for s in found), key=lambda pair: int(pair[0].rpartition("-")[2])):
        if run is None or run in (id, id.rpartition("-")[2]):
            streams.append((s, id))
    return LogPage(chunks=await _chunks(await bucket_of(ctx.buckets, row.cloud_id), streams), complete=complete)


def _run_id(stream: LogStream) -> str:
    return stream.stream.removeprefix("runs/").removesuffix(".log")


async def cluster_page(ctx: Context, row: ClusterRow, node: str | None) -> LogPage:
    """The chunks of what a cluster's nodes wrote outside their runs."""
    async with ctx.db.read() as conn:
        found = await node_streams(conn, row.id, node)
    complete = row.cluster.state.settled and _late(row.cluster.ended_at)
    chunks = await _chunks(await bucket_of(ctx.buckets, row.cloud_id), [(s, None) for s in found])
    return LogPage(chunks=chunks, complete=complete)


async def service_page(ctx: Context, cloud_id: str, cluster_ids: list[str], ended_at: datetime | None) -> LogPage:
    """The chunks of what replicas wrote (Ray's worker files) and of Serve's own logs, on these clusters, oldest cluster
    first. ``ended_at``: of the service or version whose clusters they are."""
    complete = _late(ended_at)
    async with ctx.db.read() as conn:
        found = await replica_streams(conn, cluster_ids)
    chunks = await _chunks(await bucket_of(ctx.buckets, cloud_id), [(s, None) for s in found])
    return LogPage(chunks=chunks, complete=complete)


def _late(ended_at: datetime | None) -> bool:
    return ended_at is not None and (utcnow() - ended_at).total_seconds() > LATE_S


async def _chunks(bucket: Bucket, streams: Iterable[tuple[LogStream, str | None]]) -> list[LogChunk]:
    def find() -> list[LogChunk]:
        chunks = []
        for stream, run_id in streams:
            prefix = f"logs/{stream.cluster_id}/{stream.node_id}/{stream.stream}/"
            name = f"{stream.node_id}/{stream.stream}"
            chunks += [_chunk(bucket, prefix, name, run_id, o) for o in bucket.list(prefix)]
        return chunks

    return await in_bucket(find)


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
        new = await not_followed_until(conn, cluster_ids, until - timedelta(seconds=FOLLOW_S / 2))
    if new:
        async with db.begin() as conn:
            await follow_until(conn, new, until)
