"""Services: deploy, get, list, roll out, terminate, delete. Their life is in ``workflows/services/workflow.py``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Response

from api.kit import lookup
from api.kit.acceptance import accept
from api.kit.auth import Me
from api.kit.callers import Caller
from api.kit.commands import command
from api.kit.context import Context, Ctx
from api.kit.idempotency import IdempotencyKey, Key
from api.kit.listing import Cursor, Limit, Tags, events_page, list_page, parse_tags
from api.kit.temporal import UPDATE_S
from api.services import tokens as service_tokens
from api.services.deploys import NewDeploy
from api.services.target import target_of
from api.services.view import answer, in_list
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
from store.clusters import clusters_of_service
from store.database import AsyncConnection
from store.pages import Filters, Found, PageRequest
from store.services import find as store
from store.services.deploys import delete_service
from store.services.rows import ServiceRow, VersionRow, lock_service

router = APIRouter(prefix="/v1/services", tags=["services"])
router.include_router(service_tokens.router)


@router.post("", status_code=201)
async def create(ctx: Ctx, me: Me, key: Key, body: ServiceDeploy) -> Service:
    """Deploys a version: of a new service, of a running one, or of a terminated one, which starts again with its id,
    its name and its tokens, and may get another URL. An accepted deploy is durable; the newest of ``versions`` is this
    deploy's."""
    return await accept(ctx, key, NewDeploy.of(ctx, me, body))


@router.get("")
async def list_all(
    ctx: Ctx,
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
    filters = Filters(me.scope(project), state, name, parse_tags(tag), created_after, created_before)

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[Service]:
        found = await store.list_services(conn, await lookup.on_cloud(conn, me, filters, cloud), page)
        return Found([in_list(service) for service in found.items], found.last)

    return await list_page(ctx, find, limit, cursor)


@router.get("/{ref}")
async def get(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> Service:
    """By id or name, with the current traffic of its proxies and with its tokens."""
    async with ctx.db.read() as conn:
        id = await _id(conn, me, ref, project)
    return await answer(ctx, id)


@router.get("/{ref}/versions")
async def list_versions(
    ctx: Ctx, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[ServiceVersion]:
    """Every version that it had, newest first."""

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[ServiceVersion]:
        return await store.list_versions(conn, await _id(conn, me, ref, project), page)

    return await list_page(ctx, find, limit, cursor)


@router.get("/{ref}/events")
async def list_events(
    ctx: Ctx, me: Me, ref: str, project: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Event]:
    """Its events, oldest first."""
    return await events_page(ctx, partial(_id, me=me, ref=ref, project=project), limit, cursor)


@router.get("/{ref}/logs")
async def logs(
    ctx: Ctx,
    me: Me,
    ref: str,
    version: Annotated[str | None, Query(description="One version only: its name, number or id.")] = None,
    follow: Annotated[bool, Query(description="Somebody reads as it is written: nodes ship every second.")] = False,
    project: str | None = None,
) -> LogPage:
    """Where the output of its replicas and Serve's own logs are stored, cluster by cluster; readable after those have
    ended. Versions that were updated in place share clusters, and so their logs."""
    async with ctx.db.read() as conn:
        row = await lookup.service(conn, me, ref, project)
        one = await _version(conn, row, version) if version is not None else None
        cluster_ids = [c.cluster_id for c in one.version.clusters] if one else await clusters_of_service(conn, row.id)
    ended_at = one.ended_at if one is not None else row.service.ended_at
    if follow and ended_at is None and cluster_ids:
        await follow_clusters(ctx.db, cluster_ids)
    return await service_page(ctx, row.cloud_id, cluster_ids, ended_at)


async def _version(conn: AsyncConnection, row: ServiceRow, ref: str) -> VersionRow:
    found = await store.find_version(conn, row.id, ref)
    if found is None:
        raise NotFound(
            f"Service {row.name} has no version {ref!r}.",
            remedy=f"GET /v1/services/{row.id}/versions lists them.",
            resource=row.id,
            field="version",
        )
    return found


@router.post("/{ref}/terminate")
async def terminate(
    ctx: Ctx, me: Me, key: Key, ref: str, body: ServiceTerminate | None = None, project: str | None = None
) -> Service:
    """Requests its end, at any moment; answers at once. A service that is terminated already is fine."""
    message = TerminateRequest(actor=me.actor, reason=(body or ServiceTerminate()).reason)

    async def update(service: ServiceHandle) -> None:
        await service.terminate(message, key=key.key, timeout_s=UPDATE_S)

    return await _command(ctx, me, ref, project, update, key, may_have_ended=True)


@router.post("/{ref}/rollback")
async def rollback(
    ctx: Ctx, me: Me, key: Key, ref: str, body: ServiceRollback | None = None, project: str | None = None
) -> Service:
    """Aborts the rollout in progress; without one, restores the version before."""
    message = RollbackOrder(actor=me.actor, reason=(body or ServiceRollback()).reason)

    async def update(service: ServiceHandle) -> None:
        await service.rollback(message, key=key.key, timeout_s=UPDATE_S)

    return await _command(ctx, me, ref, project, update, key)


@router.post("/{ref}/rollout")
async def rollout(ctx: Ctx, me: Me, key: Key, ref: str, body: RolloutCommand, project: str | None = None) -> Service:
    """Pauses, resumes, promotes or aborts the rollout in progress."""
    message = RolloutOrder(actor=me.actor, action=body.action, percent=body.percent)

    async def update(service: ServiceHandle) -> None:
        await service.rollout(message, key=key.key, timeout_s=UPDATE_S)

    return await _command(ctx, me, ref, project, update, key)


async def _command(
    ctx: Context,
    me: Caller,
    ref: str,
    project: str | None,
    update: Callable[[ServiceHandle], Awaitable[None]],
    key: IdempotencyKey,
    *,
    may_have_ended: bool = False,
) -> Service:
    async with ctx.db.read() as conn:
        row = await lookup.service(conn, me, ref, project)
    handle = ServiceHandle(ctx.temporal, row.id)
    await command(ctx, target_of(ctx, row), lambda: update(handle), key, may_have_ended=may_have_ended)
    return await answer(ctx, row.id)


@router.delete("/{ref}", status_code=204)
async def remove(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> Response:
    """Of a terminated service: its name is free at once, its tokens are deleted."""
    async with ctx.db.begin() as conn:
        row = await lock_service(conn, await _id(conn, me, ref, project))
        if row is None:
            return Response(status_code=204)  # a concurrent request has deleted it
        if row.state != ServiceState.TERMINATED:
            raise Conflict(
                f"Service {row.name} is {row.state}, and only a terminated one can be deleted.",
                remedy="Terminate it first, and wait until it is TERMINATED.",
                resource=row.id,
            )
        await delete_service(conn, row)
    return Response(status_code=204)


async def _id(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> str:
    return (await lookup.service(conn, me, ref, project)).id
