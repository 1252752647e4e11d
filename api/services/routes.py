"""Services: deploy, look, steer, terminate, delete. Their life is ``workflows/services/workflow.py``'s."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.kit import lookup
from api.kit.auth import Caller, Me
from api.kit.events import events_of
from api.kit.idempotency import Order, Ordered, told_once
from api.kit.pagination import Cursor, Limit, Tags, page, state_filter, tag_filter
from api.kit.temporal import UPDATE_S, updating
from api.services import tokens as service_tokens
from api.services.deploys import deliver, deploy
from api.services.tokens import only_ended
from api.services.view import answer, clusters_of, shown
from api.storage.logs import follow_clusters, service_page
from heliostat.errors import Conflict, NotFound
from heliostat.models.common import Event, Page
from heliostat.models.jobs import LogPage
from heliostat.models.services import (
    RolloutCommand,
    Service,
    ServiceDeploy,
    ServiceRollback,
    ServiceState,
    ServiceTerminate,
    ServiceVersion,
)
from runtime.messages.common import TerminateRequest
from runtime.messages.services import RollbackOrder, RolloutOrder, ServiceHandle
from store.services.deploys import delete_service
from store.services.rows import VersionRow, lock_service, stored_service, version_row
from store.tables import service_versions, services

router = APIRouter(prefix="/v1/services", tags=["services"])
router.include_router(service_tokens.router)


@router.post("", status_code=201)
async def create(request: Request, me: Me, order: Ordered, body: ServiceDeploy) -> Service:
    """Deploys a version: of a new service, of one that runs, or of a terminated one, which starts again with its id,
    its name and its tokens, and may get another URL. Accepted is durable; the newest of ``versions`` is this
    deploy's."""
    return await deploy(request.app.state, me, order, body)


@router.get("")
async def list_all(
    request: Request,
    me: Me,
    state: Annotated[list[ServiceState], Query()] = [],  # noqa: B006  FastAPI copies it
    name: str | None = None,
    project: str | None = None,
    cloud: str | None = None,
    tag: Tags = [],  # noqa: B006
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Service]:
    """Without their versions and tokens."""
    c = services.c
    query = select(c.id, c.created_at, c.doc, c.input).where(
        c.project_id.in_(me.scope(project)),
        c.withdrawn.is_(False),
        *state_filter(services, state),
        *tag_filter(services, tag, "input"),
    )
    query = query.where(c.name == name) if name is not None else query
    query = query.where(c.created_at > created_after) if created_after else query
    query = query.where(c.created_at < created_before) if created_before else query
    async with request.app.state.db.read() as conn:
        if cloud is not None:
            query = query.where(c.cloud_id == (await lookup.cloud(conn, me, cloud)).id)
        return await page(conn, query, (c.created_at, c.id), lambda r: shown(stored_service(r)), limit, cursor)


@router.get("/{ref}")
async def get(request: Request, me: Me, ref: str, project: str | None = None) -> Service:
    """By id or name, with what its proxies see now and with its tokens."""
    state = request.app.state
    async with state.db.read() as conn:
        id = (await _find(conn, me, ref, project)).id
    return await answer(state, id)


@router.get("/{ref}/versions")
async def list_versions(
    request: Request, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[ServiceVersion]:
    """Every version that it had, newest first."""
    v = service_versions.c
    async with request.app.state.db.read() as conn:
        row = await _find(conn, me, ref, project)
        query = select(service_versions).where(v.service_id == row.id)
        make = lambda r: version_row(r).version  # noqa: E731
        return await page(conn, query, (v.created_at, v.id), make, limit, cursor)


@router.get("/{ref}/events")
async def list_events(
    request: Request, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Event]:
    """Its story, oldest first."""
    async with request.app.state.db.read() as conn:
        return await events_of(conn, (await _find(conn, me, ref, project)).id, limit, cursor)


@router.get("/{ref}/logs")
async def logs(
    request: Request,
    me: Me,
    ref: str,
    version: Annotated[str | None, Query(description="One version only: its name, number or id.")] = None,
    follow: Annotated[bool, Query(description="Somebody reads as it is written: nodes ship every second.")] = False,
    project: str | None = None,
) -> LogPage:
    """Where the output of its replicas and Serve's own logs lie, cluster by cluster; readable after those are gone.
    Versions that were updated in place share clusters, and so their logs."""
    state = request.app.state
    async with state.db.read() as conn:
        row = await _find(conn, me, ref, project)
        one = await _version(conn, row, version) if version is not None else None
    ended_at = one.ended_at if one is not None else row.ended_at
    cluster_ids = [c.cluster_id for c in one.version.clusters] if one else await clusters_of(state, row.id)
    if follow and ended_at is None and cluster_ids:
        await follow_clusters(state.db, cluster_ids)
    return await service_page(state, row.cloud_id, cluster_ids, ended_at)


async def _version(conn: AsyncConnection, row: Row[Any], ref: str) -> VersionRow:
    v = service_versions.c
    which = (v.id == ref) | (v.name == ref)
    if ref.isdigit() and len(ref) < 10:
        which |= v.number == int(ref)
    found = (
        await conn.execute(
            select(service_versions).where(v.service_id == row.id, which).order_by((v.name == ref).desc()).limit(1)
        )
    ).first()
    if found is None:
        raise NotFound(
            f"Service {row.name} has no version {ref!r}.",
            remedy=f"GET /v1/services/{row.id}/versions lists them.",
            resource=row.id,
            field="version",
        )
    return version_row(found)


@router.post("/{ref}/terminate")
async def terminate(
    request: Request, me: Me, order: Ordered, ref: str, body: ServiceTerminate | None = None, project: str | None = None
) -> Service:
    """Asks for its end, at any moment; answers at once. Terminated already is fine."""
    message = TerminateRequest(actor=me.actor, reason=(body or ServiceTerminate()).reason)

    async def send(service: ServiceHandle) -> None:
        await service.terminate(message, key=order.key, timeout_s=UPDATE_S)

    return await _tell(request, me, ref, project, send, order, ended_is_fine=True)


@router.post("/{ref}/rollback")
async def rollback(
    request: Request, me: Me, order: Ordered, ref: str, body: ServiceRollback | None = None, project: str | None = None
) -> Service:
    """Abandons the rollout that is under way; without one, brings the version before back."""
    message = RollbackOrder(actor=me.actor, reason=(body or ServiceRollback()).reason)

    async def send(service: ServiceHandle) -> None:
        await service.rollback(message, key=order.key, timeout_s=UPDATE_S)

    return await _tell(request, me, ref, project, send, order)


@router.post("/{ref}/rollout")
async def rollout(
    request: Request, me: Me, order: Ordered, ref: str, body: RolloutCommand, project: str | None = None
) -> Service:
    """Pauses, resumes, promotes or aborts the rollout that is under way."""
    message = RolloutOrder(actor=me.actor, action=body.action, percent=body.percent)

    async def send(service: ServiceHandle) -> None:
        await service.rollout(message, key=order.key, timeout_s=UPDATE_S)

    return await _tell(request, me, ref, project, send, order)


async def _tell(
    request: Request,
    me: Caller,
    ref: str,
    project: str | None,
    send: Callable[[ServiceHandle], Awaitable[None]],
    order: Order,
    *,
    ended_is_fine: bool = False,
) -> Service:
    state = request.app.state
    async with state.db.read() as conn:
        row = await _find(conn, me, ref, project)
    await told_once(state.db, row.project_id, order)
    if row.state != ServiceState.TERMINATED:
        await deliver(state, row.id)
        try:
            async with updating("service", row.id):
                await send(ServiceHandle(state.temporal, row.id))
        except NotFound as e:
            await only_ended(state, row.id, e)
            if not ended_is_fine:
                raise _ended(row) from e
    elif not ended_is_fine:
        raise _ended(row)
    return await answer(state, row.id)


def _ended(row: Row[Any]) -> Conflict:
    return Conflict(f"Service {row.name} is TERMINATED.", remedy="Deploy to it to start it again.", resource=row.id)


@router.delete("/{ref}", status_code=204)
async def remove(request: Request, me: Me, ref: str, project: str | None = None) -> Response:
    """Of a terminated service: its name is free at once, its tokens are gone."""
    state = request.app.state
    async with state.db.begin() as conn:
        row = await lock_service(conn, (await _find(conn, me, ref, project)).id)
        if row is None:
            return Response(status_code=204)  # somebody was faster
        if row.state != ServiceState.TERMINATED:
            raise Conflict(
                f"Service {row.name} is {row.state}, and only a terminated one can be deleted.",
                remedy="Terminate it first, and wait until it is TERMINATED.",
                resource=row.id,
            )
        await delete_service(conn, row)
    return Response(status_code=204)


async def _find(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> Row[Any]:
    return await lookup.find(conn, services, "service", "svc", me, ref, project)
