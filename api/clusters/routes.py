"""Clusters: create, get, list, scale, terminate. Their life is in ``workflows/clusters/workflow.py``."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Response

from api.clusters.create import NewCluster, check_name_is_free, ensure_cluster_started
from api.compute_configs.resolve import resolve_compute_config
from api.kit import lookup
from api.kit.acceptance import accept
from api.kit.auth import Me
from api.kit.callers import Caller
from api.kit.checks import check_tags
from api.kit.commands import Target, command
from api.kit.context import Context, Ctx
from api.kit.dry_run import PLANNED, DryRun, answer, plan
from api.kit.idempotency import Key
from api.kit.listing import Cursor, Limit, Tags, events_page, list_page, parse_tags
from api.kit.temporal import UPDATE_S
from api.storage.logs import cluster_page, follow_clusters
from heliostat.models.clusters import Cluster, ClusterCreate, ClusterState, ClusterTerminate, Node, ScaleLimits
from heliostat.models.common import Event, Page
from heliostat.models.jobs import LogPage
from runtime.messages.clusters import ClusterHandle, LimitsUpdate
from runtime.messages.common import TerminateRequest
from store import clusters as store
from store.clusters import ClusterRow
from store.database import AsyncConnection
from store.pages import Filters, Found, PageRequest

router = APIRouter(prefix="/v1/clusters", tags=["clusters"])


@router.post("", status_code=201, response_model=Cluster, responses=PLANNED)
async def create(ctx: Ctx, me: Me, key: Key, body: ClusterCreate, dry_run: DryRun = False) -> Cluster | Response:
    """Creates a cluster. An accepted cluster is durable; follow its state with GET."""
    project = me.project(body.project)
    check_tags(body.tags)
    if dry_run:
        async with ctx.db.read() as conn:
            config, cloud = await resolve_compute_config(
                conn, me, project, body.compute_config, body.cloud, offers=ctx.offers
            )
            if body.name is not None:
                await check_name_is_free(conn, project.id, body.name)
        return answer(plan(ctx, "cluster", body.name, project.name, config, cloud, None))
    return await accept(ctx, key, NewCluster(ctx, me, project, body))


@router.get("")
async def list_all(
    ctx: Ctx,
    me: Me,
    state: Annotated[list[ClusterState], Query()] = [],  # noqa: B006  FastAPI copies it
    name: str | None = None,
    project: str | None = None,
    cloud: str | None = None,
    tag: Tags = [],  # noqa: B006
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Cluster]:
    filters = Filters(me.scope(project), state, name, parse_tags(tag), created_after, created_before)

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[Cluster]:
        return await store.list_clusters(conn, await lookup.on_cloud(conn, me, filters, cloud), page)

    return await list_page(ctx, find, limit, cursor)


@router.get("/{ref}")
async def get(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> Cluster:
    async with ctx.db.read() as conn:
        return (await lookup.cluster(conn, me, ref, project)).cluster


@router.post("/{ref}/terminate")
async def terminate(
    ctx: Ctx, me: Me, key: Key, ref: str, body: ClusterTerminate | None = None, project: str | None = None
) -> Cluster:
    """Requests its end, at any moment; answers at once. A cluster that has ended already is fine."""
    async with ctx.db.read() as conn:
        row = await lookup.cluster(conn, me, ref, project)
    message = TerminateRequest(actor=me.actor, reason=(body or ClusterTerminate()).reason)

    async def update() -> None:
        await ClusterHandle(ctx.temporal, row.id).terminate(message, key=key.key, timeout_s=UPDATE_S)

    await command(ctx, _target(ctx, row), update, key, may_have_ended=True)
    return (await _load(ctx, row.id)).cluster


@router.patch("/{ref}/limits")
async def set_limits(ctx: Ctx, me: Me, ref: str, body: ScaleLimits, project: str | None = None) -> Cluster:
    """New minimum and maximum of one worker group, for this cluster only."""
    async with ctx.db.read() as conn:
        row = await lookup.cluster(conn, me, ref, project)
    message = LimitsUpdate(actor=me.actor, **body.model_dump())

    async def update() -> None:
        await ClusterHandle(ctx.temporal, row.id).set_limits(message, timeout_s=UPDATE_S)

    await command(ctx, _target(ctx, row), update, None, may_have_ended=False)
    return (await _load(ctx, row.id)).cluster


def _target(ctx: Context, row: ClusterRow) -> Target:
    async def start() -> None:
        if not row.started:
            await ensure_cluster_started(ctx, row.input)

    async def reload() -> Target:
        return _target(ctx, await _load(ctx, row.id))

    return Target(
        noun="cluster",
        id=row.id,
        name=row.cluster.name,
        project_id=row.project_id,
        state=row.cluster.state,
        ended=row.cluster.state.settled,
        after_end="Create a new one.",
        if_gone="The sweep ends its machines; nothing else is left to do.",
        ensure_started=start,
        reload=reload,
    )


async def _load(ctx: Context, id: str) -> ClusterRow:
    row = await store.load_cluster(ctx.db, id)
    assert row is not None
    return row


@router.get("/{ref}/nodes")
async def list_nodes(
    ctx: Ctx, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Node]:
    """Every node that it ever requested, oldest first."""

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[Node]:
        return await store.list_nodes(conn, await _id(conn, me, ref, project), page)

    return await list_page(ctx, find, limit, cursor)


@router.get("/{ref}/events")
async def list_events(
    ctx: Ctx, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Event]:
    """Its events, oldest first."""
    return await events_page(ctx, partial(_id, me=me, ref=ref, project=project), limit, cursor)


@router.get("/{ref}/logs")
async def logs(
    ctx: Ctx, me: Me, ref: str, node: str | None = None, follow: bool = False, project: str | None = None
) -> LogPage:
    """Where the logs of its nodes (agent, Ray) are stored; readable after it has ended."""
    async with ctx.db.read() as conn:
        row = await lookup.cluster(conn, me, ref, project)
    if follow:
        await follow_clusters(ctx.db, [row.id])
    return await cluster_page(ctx, row, node)


async def _id(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> str:
    return (await lookup.cluster(conn, me, ref, project)).id
