"""Where nodes put their logs: presigned URLs of the cloud's bucket, so that no log byte passes through the API."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from api.agents.nodes import AnyNode, CallingNode, Fleet
from api.storage.buckets import bucket_of
from heliostat.errors import PermissionDenied
from heliostat.models.agents import LogSignAnswer, LogSignRequest
from heliostat.models.common import utcnow
from store.database import Database, insert
from store.tables import log_streams

router = APIRouter()

URL_S = 900
"""A chunk is signed when it is about to be sent; a slow line may take minutes for its MiB."""


def log_prefix(cluster_id: str, node_id: str) -> str:
    return f"logs/{cluster_id}/{node_id}"


def log_key(prefix: str, stream: str, offset: int) -> str:
    """Twenty digits: the bucket's key order is the order of the bytes."""
    return f"{prefix}/{stream}/{offset:020d}"


@router.post("/logs/sign", response_model=LogSignAnswer)
async def sign(request: Request, body: LogSignRequest, node: AnyNode) -> LogSignAnswer:
    """One PUT URL a chunk, below this node's own prefix. A run's stream is taken from the cluster that runs it only."""
    state = request.app.state
    fleet: Fleet = state.fleet
    streams: dict[str, str | None] = {item.stream: None for item in body.items}
    for stream in streams:
        streams[stream] = await _job_of(fleet, node, stream)
    await _register(state.db, fleet, node, streams)
    view = await fleet.view(node.cluster_id)
    bucket = await bucket_of(state.buckets, view.cloud_id)
    prefix = log_prefix(node.cluster_id, node.id)
    keys = [log_key(prefix, item.stream, item.offset) for item in body.items]
    return LogSignAnswer(urls=await asyncio.to_thread(lambda: [bucket.presign_put(key, URL_S) for key in keys]))


async def _job_of(fleet: Fleet, node: CallingNode, stream: str) -> str | None:
    """The job whose log this is, None for a log of the node."""
    if not stream.startswith("runs/"):
        return None
    run_id = stream.removeprefix("runs/").removesuffix(".log")
    if not await fleet.runs_here(node.cluster_id, run_id):
        raise PermissionDenied(
            f"Run {run_id!r} is not one of cluster {node.cluster_id}.",
            remedy="Ship logs of this cluster's runs only.",
            resource=node.id,
        )
    return run_id.rpartition("-")[0]


async def _register(db: Database, fleet: Fleet, node: CallingNode, streams: dict[str, str | None]) -> None:
    new = [s for s in streams if (node.id, s) not in fleet.streams]
    if not new:
        return
    async with db.begin() as conn:
        await conn.execute(
            insert(conn, log_streams)
            .values(
                [
                    {
                        "cluster_id": node.cluster_id,
                        "node_id": node.id,
                        "stream": s,
                        "job_id": streams[s],
                        "complete": False,
                        "created_at": utcnow(),
                    }
                    for s in new
                ]
            )
            .on_conflict_do_nothing()
        )
    fleet.streams.update((node.id, s) for s in new)
