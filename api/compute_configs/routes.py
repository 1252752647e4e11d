"""Compute configs, versioned: a new version under an old name, never an edit."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from api.compute_configs.resolve import compute_config_version, resolve_compute_config
from api.kit.auth import Caller, Me
from api.kit.idempotency import Ordered, claim, earlier
from api.kit.pagination import Cursor, Limit, page
from heliostat.models.common import Page, new_id, utcnow
from heliostat.models.compute_configs import ComputeConfigCreate, ComputeConfigVersion
from store.tables import compute_configs, projects

router = APIRouter(prefix="/v1/compute-configs", tags=["compute configs"])


@router.post("", status_code=201)
async def create(
    request: Request, me: Me, order: Ordered, body: ComputeConfigCreate, project: str | None = None
) -> ComputeConfigVersion:
    """Under an existing name: its next version. Refused when it can't fit into its cloud."""
    owner = me.project(project)
    c = compute_configs.c
    async with request.app.state.db.begin() as conn:
        before = await earlier(conn, owner.id, order)
        if before is None:
            await resolve_compute_config(conn, me, owner, body.config, None, offers=request.app.state.offers)
            # Creates in one project wait for each other: two at once must not get the same version.
            await conn.execute(select(projects.c.id).where(projects.c.id == owner.id).with_for_update())
            id = new_id("cfg")
            if not await claim(conn, owner.id, order, id):
                before = await earlier(conn, owner.id, order)
        if before is not None:
            return await compute_config_version(conn, me, [owner.id], before)
        newest = await conn.scalar(select(func.max(c.version)).where(c.project_id == owner.id, c.name == body.name))
        row: dict[str, Any] = {
            "id": id,
            "name": body.name,
            "version": (newest or 0) + 1 if body.name else 1,
            "config": body.config.model_dump(mode="json"),
            "created_by": me.name,
            "created_at": utcnow(),
        }
        await conn.execute(compute_configs.insert().values(project_id=owner.id, **row))
    return ComputeConfigVersion.model_validate(row)


@router.get("")
async def list_all(
    request: Request,
    me: Me,
    name: str | None = None,
    project: str | None = None,
    archived: bool = False,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[ComputeConfigVersion]:
    """Named ones, every version, newest first. ``archived``: those too."""
    c = compute_configs.c
    query = select(compute_configs).where(c.project_id.in_(me.scope(project)), c.name.is_not(None))
    query = query.where(c.name == name) if name is not None else query
    query = query if archived else query.where(c.archived_at.is_(None))
    make = lambda r: ComputeConfigVersion.model_validate(r._mapping)  # noqa: E731
    async with request.app.state.db.read() as conn:
        return await page(conn, query, (c.created_at, c.id), make, limit, cursor)


@router.get("/{ref}")
async def get(request: Request, me: Me, ref: str, project: str | None = None) -> ComputeConfigVersion:
    """``name`` (the newest version), ``name:version`` or id."""
    async with request.app.state.db.read() as conn:
        return await _find(conn, me, ref, project)


@router.post("/{ref}/archive")
async def archive(request: Request, me: Me, ref: str, project: str | None = None) -> ComputeConfigVersion:
    """No new cluster may use it; those that do go on. A name without a version archives all of its versions."""
    c = compute_configs.c
    async with request.app.state.db.begin() as conn:
        found = await _find(conn, me, ref, project)
        which = c.id == found.id
        if ref == found.name:
            owner = select(c.project_id).where(c.id == found.id).scalar_subquery()
            which = (c.name == found.name) & (c.project_id == owner)
        await conn.execute(update(compute_configs).where(which, c.archived_at.is_(None)).values(archived_at=utcnow()))
        return await compute_config_version(conn, me, me.scope(project), found.id)


async def _find(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> ComputeConfigVersion:
    return await compute_config_version(conn, me, me.scope(project), ref)
