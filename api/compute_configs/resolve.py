"""Resolves the compute config and the cloud that a request names."""

from __future__ import annotations

from api.compute_configs.placement import default_config, placed
from api.kit.callers import Caller, Project
from api.kit.context import Offers
from api.kit.lookup import cloud
from heliostat.errors import Conflict, InvalidRequest, NotFound
from heliostat.models.clouds import Cloud
from heliostat.models.compute_configs import ComputeConfig, ComputeConfigVersion
from store.compute_configs import find_config_version, has_config_named
from store.database import AsyncConnection


async def compute_config_version(
    conn: AsyncConnection, project_ids: list[str], ref: str, field: str | None = None
) -> ComputeConfigVersion:
    """By id, ``name:version``, or ``name``: its newest version that is not archived, else the newest."""
    found = await find_config_version(conn, project_ids, ref)
    if found is None:
        raise NotFound(
            f"There is no compute config {ref!r}.",
            remedy="GET /v1/compute-configs lists them; write name, name:version or an id.",
            resource=ref,
            field=field,
        )
    return found


async def resolve_compute_config(
    conn: AsyncConnection,
    me: Caller,
    project: Project,
    wanted: str | ComputeConfig | None,
    cloud_ref: str | None,
    default_cloud: str | None = None,
    *,
    offers: Offers,
) -> tuple[ComputeConfig, Cloud]:
    """The compute config that a request names, with instance types and zones filled in, and its cloud; refused when it
    can't fit there. ``default_cloud``: where neither names a cloud, instead of the organization's default one."""
    config = wanted if isinstance(wanted, ComputeConfig) else ComputeConfig()
    if isinstance(wanted, str) and (built_in := await _built_in(conn, project, wanted)) is not None:
        config = built_in
    elif isinstance(wanted, str):
        version = await compute_config_version(conn, [project.id], wanted, "compute_config")
        if version.archived_at is not None:
            raise Conflict(
                f"Compute config {wanted!r} is archived.",
                remedy="Create a new version of it, or name another one.",
                resource=wanted,
                field="compute_config",
            )
        config = version.config
    where = await cloud(conn, me, cloud_ref or config.cloud or default_cloud)
    if cloud_ref and config.cloud and config.cloud not in (where.id, where.name):
        raise InvalidRequest(
            f"The compute config is for cloud {config.cloud!r}, the request for {cloud_ref!r}.",
            remedy="Leave out one of them, or name the same cloud.",
            field="cloud",
        )
    return placed(config, where, offers), where


async def _built_in(conn: AsyncConnection, project: Project, name: str) -> ComputeConfig | None:
    """The config that every cloud has with this name, unless the project has its own."""
    config = default_config(name)
    if config is None or await has_config_named(conn, project.id, name):
        return None
    return config
