"""Where nodes store their logs: presigned URLs of the cloud's bucket, so that no log byte passes through the API."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from api.agents.context import AgentCtx, AnyNode
from api.agents.fleet import CallingNode, Fleet
from api.kit.context import Ctx
from api.storage.buckets import bucket_of
from heliostat.errors import PermissionDenied
from heliostat.models.agents import LogSignAnswer, LogSignRequest
from store.database import Database
from store.log_streams import register_streams

router = APIRouter()

URL_S = 900
"""A chunk is signed when it is about to be sent; a slow line may take minutes for its MiB."""


def log_prefix(cluster_id: str, node_id: str) -> str:
    return f"logs/{cluster_id}/{node_id}"


def log_key(prefix: str, stream: str, offset: int) -> str:
    """Twenty digits: the bucket's key order is the order of the bytes."""
    return f"{prefix}/{stream}/{offset:020d}"


@router.post("/logs/sign", response_model=LogSignAnswer)
async def sign(ctx: Ctx, agents: AgentCtx, body: LogSignRequest, node: AnyNode) -> LogSignAnswer:
    """One PUT URL a chunk, below this node's own prefix. A run's stream is taken from the cluster that runs it only."""
    fleet = agents.fleet
    streams: dict[str, str | None] = {item.stream: None for item in body.items}
    for stream in streams:
        streams[stream] = await _job_of(fleet, node, stream)
    await _register(ctx.db, fleet, node, streams)
    view = await fleet.view(node.cluster_id)
    bucket = await bucket_of(ctx.buckets, view.cloud_id)
    prefix = log_prefix(node.cluster_id, node.id)
    keys = [log_key(prefix, item.stream, item.offset) for item in body.items]
    return LogSignAnswer(urls=await asyncio.to_thread(lambda: [bucket.presign_put(key, URL_S) for key in keys]))


async def _job_of(fleet: Fleet, node: CallingNode, stream: str) -> str | None:
    """The job whose log this is, None for a log of the node."""
    if not stream.startswith("runs/"):
        return None
    run_id = stream.removeprefix("runs/").removesuffix(".log")
    if not await fleet.has_run(node.cluster_id, run_id):
        raise PermissionDenied(
            f"Run {run_id!r} is not one of cluster {node.cluster_id}.",
            remedy="Ship logs of this cluster's runs only.",
            resource=node.id,
        )
    return run_id.rpartition("-")[0]


async def _register(db: Database, fleet: Fleet, node: CallingNode, jobs: dict[str, str | None]) -> None:
    new = {stream: job_id for stream, job_id in jobs.items() if (node.id, stream) not in fleet.streams}
    if not new:
        return
    async with db.begin() as conn:
        await register_streams(conn, node.cluster_id, node.id, new)
    fleet.streams.update((node.id, stream) for stream in new)
