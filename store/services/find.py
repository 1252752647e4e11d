"""Services, their versions and deploys as the API looks them up and lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.services import Service, ServiceVersion
from runtime.messages.services import DeployRequest
from store.lookup import Match, find_row
from store.pages import Filters, Found, PageRequest, read_page
from store.services.rows import ServiceRow, VersionRow, service_row, stored_service, version_row
from store.tables import service_deploys, service_versions, services


@dataclass(frozen=True)
class DeployRow:
    service_id: str
    started: bool
    request: DeployRequest


async def find_service(conn: AsyncConnection, project_ids: Sequence[str], ref: str) -> Match[ServiceRow]:
    """By id or name."""
    return await find_row(conn, services, "svc", service_row, project_ids, ref)


async def list_services(conn: AsyncConnection, filters: Filters, page: PageRequest) -> Found[Service]:
    """Newest first, without their versions and tokens."""
    c = services.c
    query = select(c.id, c.created_at, c.doc, c.input).where(*filters.of(services, tags_in="input"))
    return await read_page(conn, query, (c.created_at, c.id), stored_service, page)


async def list_versions(conn: AsyncConnection, service_id: str, page: PageRequest) -> Found[ServiceVersion]:
    """Every version that the service had, newest first."""
    v = service_versions.c
    query = select(service_versions).where(v.service_id == service_id)
    return await read_page(conn, query, (v.created_at, v.id), lambda r: version_row(r).version, page)


async def find_version(conn: AsyncConnection, service_id: str, ref: str) -> VersionRow | None:
    """By name, number or id."""
    v = service_versions.c
    which = (v.id == ref) | (v.name == ref)
    if ref.isdigit() and len(ref) < 10:
        which |= v.number == int(ref)
    query = select(service_versions).where(v.service_id == service_id, which)
    row = (await conn.execute(query.order_by((v.name == ref).desc()).limit(1))).first()
    return version_row(row) if row is not None else None


async def version_names(conn: AsyncConnection, service_id: str) -> set[str]:
    """Of all versions that the service had."""
    v = service_versions.c
    return set(await conn.scalars(select(v.name).where(v.service_id == service_id)))


async def load_deploy(conn: AsyncConnection, deploy_id: str) -> DeployRow | None:
    d = service_deploys.c
    row = (await conn.execute(select(d.service_id, d.started, d.request).where(d.id == deploy_id))).first()
    if row is None:
        return None
    return DeployRow(row.service_id, row.started, DeployRequest.model_validate(row.request))
