"""Compute configs, versioned: a new version of an existing name, never an edit."""

from __future__ import annotations

from fastapi import APIRouter

from api.compute_configs.resolve import compute_config_version, resolve_compute_config
from api.kit.auth import Me
from api.kit.context import Ctx
from api.kit.idempotency import Key, find_previous, reserve
from api.kit.listing import Cursor, Limit, list_page
from heliostat.models.common import Page, new_id, utcnow
from heliostat.models.compute_configs import ComputeConfigCreate, ComputeConfigVersion
from store.compute_configs import archive_config, insert_config_version, list_config_versions, next_config_version
from store.database import AsyncConnection
from store.pages import Found, PageRequest
from store.people import lock_project

router = APIRouter(prefix="/v1/compute-configs", tags=["compute configs"])


@router.post("", status_code=201)
async def create(
    ctx: Ctx, me: Me, key: Key, body: ComputeConfigCreate, project: str | None = None
) -> ComputeConfigVersion:
    """With an existing name: its next version. Refused when it can't fit into its cloud."""
    owner = me.project(project)
    async with ctx.db.begin() as conn:
        previous = await find_previous(conn, owner.id, key)
        if previous is None:
            await resolve_compute_config(conn, me, owner, body.config, None, offers=ctx.offers)
            await lock_project(conn, owner.id)  # concurrent creates in one project must not get the same version
            id = new_id("cfg")
            previous = await reserve(conn, owner.id, key, id)
        if previous is not None:
            return await compute_config_version(conn, [owner.id], previous)
        made = ComputeConfigVersion(
            id=id,
            name=body.name,
            version=await next_config_version(conn, owner.id, body.name),
            config=body.config,
            created_by=me.name,
            created_at=utcnow(),
        )
        await insert_config_version(conn, owner.id, made)
    return made


@router.get("")
async def list_all(
    ctx: Ctx,
    me: Me,
    name: str | None = None,
    project: str | None = None,
    archived: bool = False,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[ComputeConfigVersion]:
    """Every version of the configs that have a name, newest first. ``archived``: those too."""
    scope = me.scope(project)

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[ComputeConfigVersion]:
        return await list_config_versions(conn, scope, name, archived, page)

    return await list_page(ctx, find, limit, cursor)


@router.get("/{ref}")
async def get(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> ComputeConfigVersion:
    """``name`` (the newest version), ``name:version`` or id."""
    async with ctx.db.read() as conn:
        return await compute_config_version(conn, me.scope(project), ref)


@router.post("/{ref}/archive")
async def archive(ctx: Ctx, me: Me, ref: str, project: str | None = None) -> ComputeConfigVersion:
    """No new cluster may use it; existing ones keep running. A name without a version archives all of its versions."""
    async with ctx.db.begin() as conn:
        found = await compute_config_version(conn, me.scope(project), ref)
        await archive_config(conn, found, all_versions=ref == found.name)
        return await compute_config_version(conn, me.scope(project), found.id)
