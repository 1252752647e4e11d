"""Compute configs, version by version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, false, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import is_id, utcnow
from heliostat.models.compute_configs import ComputeConfigVersion
from store.pages import Found, PageRequest, read_page
from store.tables import compute_configs


async def find_config_version(
    conn: AsyncConnection, project_ids: Sequence[str], ref: str
) -> ComputeConfigVersion | None:
    """By id, ``name:version``, or ``name``: its newest version that is not archived, else the newest."""
    c = compute_configs.c
    name, _, version = ref.partition(":")
    if is_id(ref, "cfg"):
        which: ColumnElement[bool] = c.id == ref
    elif version.isdigit() and len(version) < 10:
        which = (c.name == name) & (c.version == int(version))
    else:
        which = c.name == ref if not version else false()
    query = select(compute_configs).where(c.project_id.in_(project_ids), which)
    row = (await conn.execute(query.order_by(c.archived_at.is_not(None), c.version.desc()).limit(1))).first()
    return _version(row) if row is not None else None


async def has_config_named(conn: AsyncConnection, project_id: str, name: str) -> bool:
    c = compute_configs.c
    return await conn.scalar(select(c.id).where(c.project_id == project_id, c.name == name).limit(1)) is not None


async def next_config_version(conn: AsyncConnection, project_id: str, name: str | None) -> int:
    """1 for a config without a name. Call with the project locked."""
    c = compute_configs.c
    newest = await conn.scalar(select(func.max(c.version)).where(c.project_id == project_id, c.name == name))
    return (newest or 0) + 1 if name else 1


async def insert_config_version(conn: AsyncConnection, project_id: str, version: ComputeConfigVersion) -> None:
    await conn.execute(
        compute_configs.insert().values(
            id=version.id,
            project_id=project_id,
            name=version.name,
            version=version.version,
            config=version.config.model_dump(mode="json"),
            created_by=version.created_by,
            created_at=version.created_at,
        )
    )


async def list_config_versions(
    conn: AsyncConnection, project_ids: Sequence[str], name: str | None, archived: bool, page: PageRequest
) -> Found[ComputeConfigVersion]:
    """Every version of those that have a name, newest first. ``archived``: those too."""
    c = compute_configs.c
    query = select(compute_configs).where(c.project_id.in_(project_ids), c.name.is_not(None))
    query = query.where(c.name == name) if name is not None else query
    query = query if archived else query.where(c.archived_at.is_(None))
    return await read_page(conn, query, (c.created_at, c.id), _version, page)


async def archive_config(conn: AsyncConnection, version: ComputeConfigVersion, *, all_versions: bool) -> None:
    """This version, or all of its name in its project."""
    c = compute_configs.c
    which = c.id == version.id
    if all_versions:
        owner = select(c.project_id).where(c.id == version.id).scalar_subquery()
        which = (c.name == version.name) & (c.project_id == owner)
    await conn.execute(update(compute_configs).where(which, c.archived_at.is_(None)).values(archived_at=utcnow()))


def _version(row: Row[Any]) -> ComputeConfigVersion:
    return ComputeConfigVersion.model_validate(row._mapping)
