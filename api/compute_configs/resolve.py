"""Resolves the compute config and the cloud that a request names."""

from __future__ import annotations

from sqlalchemy import ColumnElement, false, select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.compute_configs.placement import Offers, default_config, placed
from api.kit.auth import Caller, Project
from api.kit.lookup import cloud
from heliostat.errors import Conflict, InvalidRequest, NotFound
from heliostat.models.clouds import Cloud
from heliostat.models.common import is_id
from heliostat.models.compute_configs import ComputeConfig, ComputeConfigVersion
from store.tables import compute_configs


async def compute_config_version(
    conn: AsyncConnection, caller: Caller, projects: list[str], ref: str, field: str | None = None
) -> ComputeConfigVersion:
    """By id, ``name:version``, or ``name``: its newest version that is not archived, else the newest."""
    c = compute_configs.c
    name, _, version = ref.partition(":")
    if is_id(ref, "cfg"):
        which: ColumnElement[bool] = c.id == ref
    elif version.isdigit() and len(version) < 10:
        which = (c.name == name) & (c.version == int(version))
    else:
        which = c.name == ref if not version else false()
    query = select(compute_configs).where(c.project_id.in_(projects), which)
    row = (await conn.execute(query.order_by(c.archived_at.is_not(None), c.version.desc()).limit(1))).first()
    if row is None:
        raise NotFound(
            f"There is no compute config {ref!r}.",
            remedy="GET /v1/compute-configs lists them; write name, name:version or an id.",
            resource=ref,
            field=field,
        )
    return ComputeConfigVersion.model_validate(row._mapping)


async def resolve_compute_config(
    conn: AsyncConnection,
    caller: Caller,
    project: Project,
    wanted: str | ComputeConfig | None,
    cloud_ref: str | None,
    otherwise: str | None = None,
    *,
    offers: Offers,
) -> tuple[ComputeConfig, Cloud]:
    """The compute config that is meant, with instance types and zones filled in, and the cloud that it is for; refused
    here when it can't fit there. ``otherwise``: the cloud where neither names one, instead of the default one."""
    config = wanted if isinstance(wanted, ComputeConfig) else ComputeConfig()
    if isinstance(wanted, str) and (built_in := await _built_in(conn, project, wanted)) is not None:
        config = built_in
    elif isinstance(wanted, str):
        version = await compute_config_version(conn, caller, [project.id], wanted, "compute_config")
        if version.archived_at is not None:
            raise Conflict(
                f"Compute config {wanted!r} is archived.",
                remedy="Create a new version of it, or name another one.",
                resource=wanted,
                field="compute_config",
            )
        config = version.config
    where = await cloud(conn, caller, cloud_ref or config.cloud or otherwise)
    if cloud_ref and config.cloud and config.cloud not in (where.id, where.name):
        raise InvalidRequest(
            f"The compute config is for cloud {config.cloud!r}, the request for {cloud_ref!r}.",
            remedy="Leave out one of them, or name the same cloud.",
            field="cloud",
        )
    return placed(config, where, offers), where


async def _built_in(conn: AsyncConnection, project: Project, name: str) -> ComputeConfig | None:
    """The config that every cloud has under this name, unless the project has its own."""
    config = default_config(name)
    if config is None:
        return None
    own = select(compute_configs.c.id).where(compute_configs.c.project_id == project.id, compute_configs.c.name == name)
    return None if await conn.scalar(own.limit(1)) is not None else config
