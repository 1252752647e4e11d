"""Clusters: create, look, scale, terminate. Their life is ``workflows/clusters/workflow.py``'s."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.compute_configs.resolve import resolve_compute_config
from api.kit import lookup
from api.kit.acceptance import first_event, start, start_again
from api.kit.auth import Caller, Me
from api.kit.checks import check_tags
from api.kit.dry_run import PLANNED, DryRun, answer, plan
from api.kit.events import events_of
from api.kit.idempotency import Order, Ordered, claim, earlier, told_once
from api.kit.limits import limits
from api.kit.pagination import Cursor, Limit, Tags, page, state_filter, tag_filter
from api.kit.temporal import UPDATE_S, updating
from api.storage.logs import cluster_page, follow_clusters
from heliostat.errors import Conflict, HeliostatError, NotFound
from heliostat.models.clusters import (
    Cluster,
    ClusterCreate,
    ClusterState,
    ClusterTerminate,
    Node,
    ScaleLimits,
)
from heliostat.models.common import Event, Page, new_id, utcnow
from heliostat.models.jobs import LogPage
from runtime.messages.clusters import ClusterHandle, ClusterInput, LimitsUpdate, start_cluster
from runtime.messages.common import TerminateRequest
from store.clusters import insert_cluster, load_cluster
from store.tables import clusters, nodes

router = APIRouter(prefix="/v1/clusters", tags=["clusters"])


@router.post("", status_code=201, response_model=Cluster, responses=PLANNED)
async def create(
    request: Request, me: Me, order: Ordered, body: ClusterCreate, dry_run: DryRun = False
) -> Cluster | Response:
    """Asks for a cluster. Accepted is durable; follow its state with GET."""
    state = request.app.state
    project = me.project(body.project)
    check_tags(body.tags)
    if dry_run:
        async with state.db.read() as conn:
            config, cloud = await resolve_compute_config(
                conn, me, project, body.compute_config, body.cloud, offers=state.offers
            )
            if body.name is not None:
                await _must_be_free(conn, project.id, body.name)
        return answer(plan(state, "cluster", body.name, project.name, config, cloud, None))
    async with state.db.read() as conn:
        before = await earlier(conn, project.id, order)
        if before is None:
            config, cloud = await resolve_compute_config(
                conn, me, project, body.compute_config, body.cloud, offers=state.offers
            )
    if before is not None:
        return await _repeated(state, before)
    now, id = utcnow(), new_id("cl")
    cluster = Cluster(
        id=id,
        name=body.name or f"cluster-{id[-6:]}",
        project=project.name,
        cloud=cloud.name,
        state=ClusterState.STARTING,
        compute_config=config,
        tags=body.tags,
        created_by=me.name,
        created_at=now,
        state_since=now,
    )
    arg = ClusterInput(
        cluster_id=id,
        name=cluster.name,
        project_id=project.id,
        project=project.name,
        cloud_id=cloud.id,
        cloud=cloud.name,
        config=config,
        created_by=me.name,
        created_at=now,
        tags=body.tags,
        limits=limits(state.settings, cloud),
    )
    if (other := await _write(state, me, order, cluster, arg)) is not None:
        return await _repeated(state, other)
    await start(state, "cluster", id, project.id, order, start_cluster(state.temporal, state.settings.task_queue, arg))
    return cluster


async def _write(state: Any, me: Caller, order: Order, cluster: Cluster, arg: ClusterInput) -> str | None:
    """The rows of an accepted cluster. The id of the one that the same order made meanwhile, if it did."""
    async with state.db.begin() as conn:
        if not await claim(conn, arg.project_id, order, cluster.id):
            return await earlier(conn, arg.project_id, order)
        if not await insert_cluster(conn, cluster, arg):
            await _must_be_free(conn, arg.project_id, cluster.name)
            raise Conflict(
                f"The name {cluster.name!r} was taken a moment ago.",
                remedy="Try again.",
                resource=cluster.name,
                field="name",
            )
        await first_event(conn, cluster.id, me.actor, f"cluster {cluster.name} asked for on cloud {cluster.cloud}")
    return None


async def _must_be_free(conn: AsyncConnection, project_id: str, name: str) -> None:
    c = clusters.c
    other = await conn.scalar(select(c.id).where(c.project_id == project_id, c.live_name == name))
    if other is not None:
        raise Conflict(
            f"The name {name!r} is taken by cluster {other}, which has not ended.",
            remedy="Choose another name, or terminate that cluster first.",
            resource=name,
            field="name",
        )


async def _repeated(state: Any, id: str) -> Cluster:
    row = await load_cluster(state.db, id)
    if row is None:
        raise NotFound(f"Cluster {id} is gone by retention.", remedy="Use a new Idempotency-Key.", resource=id)
    if not row.started:
        await start_again(state, "cluster", id, start_cluster(state.temporal, state.settings.task_queue, row.input))
    return row.cluster


@router.get("")
async def list_all(
    request: Request,
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
    c = clusters.c
    query = select(c.id, c.created_at, c.doc).where(
        c.project_id.in_(me.scope(project)),
        c.withdrawn.is_(False),
        *state_filter(clusters, state),
        *tag_filter(clusters, tag),
    )
    query = query.where(c.name == name) if name is not None else query
    query = query.where(c.created_at > created_after) if created_after else query
    query = query.where(c.created_at < created_before) if created_before else query
    async with request.app.state.db.read() as conn:
        if cloud is not None:
            query = query.where(c.cloud_id == (await lookup.cloud(conn, me, cloud)).id)
        return await page(conn, query, (c.created_at, c.id), lambda r: Cluster.model_validate(r.doc), limit, cursor)


@router.get("/{ref}")
async def get(request: Request, me: Me, ref: str, project: str | None = None) -> Cluster:
    async with request.app.state.db.read() as conn:
        return Cluster.model_validate((await _find(conn, me, ref, project)).doc)


@router.post("/{ref}/terminate")
async def terminate(
    request: Request, me: Me, order: Ordered, ref: str, body: ClusterTerminate | None = None, project: str | None = None
) -> Cluster:
    """Asks for its end, at any moment; answers at once. Ended already is fine."""
    message = TerminateRequest(actor=me.actor, reason=(body or ClusterTerminate()).reason)

    async def send(cluster: ClusterHandle) -> None:
        await cluster.terminate(message, key=order.key, timeout_s=UPDATE_S)

    return await _tell(request, me, ref, project, send, order, ended_is_fine=True)


@router.patch("/{ref}/limits")
async def set_limits(request: Request, me: Me, ref: str, body: ScaleLimits, project: str | None = None) -> Cluster:
    """New minimum and maximum of one worker group, for this cluster only."""
    message = LimitsUpdate(actor=me.actor, **body.model_dump())

    async def send(cluster: ClusterHandle) -> None:
        await cluster.set_limits(message, timeout_s=UPDATE_S)

    return await _tell(request, me, ref, project, send, None)


async def _tell(
    request: Request,
    me: Caller,
    ref: str,
    project: str | None,
    send: Callable[[ClusterHandle], Awaitable[None]],
    order: Order | None,
    *,
    ended_is_fine: bool = False,
) -> Cluster:
    state = request.app.state
    async with state.db.read() as conn:
        found = await _find(conn, me, ref, project)
    id: str = found.id
    if order is not None:
        await told_once(state.db, found.project_id, order)
    row = await load_cluster(state.db, id)
    assert row is not None
    if not row.cluster.state.settled:
        if not row.started:
            await start_again(state, "cluster", id, start_cluster(state.temporal, state.settings.task_queue, row.input))
        try:
            async with updating("cluster", id):
                await send(ClusterHandle(state.temporal, id))
        except NotFound as e:
            await _only_ended(state, id, e)
        row = await load_cluster(state.db, id)
        assert row is not None
    if row.cluster.state.settled and not ended_is_fine:
        raise Conflict(f"Cluster {row.cluster.name} is {row.cluster.state}.", remedy="Create a new one.", resource=id)
    return row.cluster


async def _only_ended(state: Any, id: str, error: HeliostatError) -> None:
    """Its workflow has ended just now, which is fine, or somebody terminated it in Temporal, which is not."""
    row = await load_cluster(state.db, id)
    if row is None or not row.cluster.state.settled:
        if error.message != "Temporal does not know it.":
            raise error
        raise Conflict(
            f"The workflow of cluster {id} is gone.",
            remedy="The sweep ends its machines; nothing else is to be done with it.",
            resource=id,
        ) from error


@router.get("/{ref}/nodes")
async def list_nodes(
    request: Request, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Node]:
    """Every node that it ever asked for, oldest first."""
    n = nodes.c
    async with request.app.state.db.read() as conn:
        row = await _find(conn, me, ref, project)
        query = select(n.id, n.created_at, n.doc).where(n.cluster_id == row.id)
        make = lambda r: Node.model_validate(r.doc)  # noqa: E731
        return await page(conn, query, (n.created_at, n.id), make, limit, cursor, oldest_first=True)


@router.get("/{ref}/events")
async def list_events(
    request: Request, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Event]:
    """Its story, oldest first."""
    async with request.app.state.db.read() as conn:
        return await events_of(conn, (await _find(conn, me, ref, project)).id, limit, cursor)


@router.get("/{ref}/logs")
async def logs(
    request: Request, me: Me, ref: str, node: str | None = None, follow: bool = False, project: str | None = None
) -> LogPage:
    """Where the logs of its nodes (agent, Ray) lie; readable after it is gone."""
    state = request.app.state
    async with state.db.read() as conn:
        row = await _find(conn, me, ref, project)
    if follow:
        await follow_clusters(state.db, [row.id])
    return await cluster_page(state, row, node)


async def _find(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> Row[Any]:
    return await lookup.find(conn, clusters, "cluster", "cl", me, ref, project)
