"""What a request names, found in the records: names or ids everywhere, others' things are not found."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, false, select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.auth import Caller, Project
from api.placement import Offers, default_config, placed
from heliostat.errors import Conflict, InvalidRequest, NotFound
from heliostat.models.clouds import Cloud
from heliostat.models.clusters import Cluster
from heliostat.models.common import is_id
from heliostat.models.compute_configs import ComputeConfig, ComputeConfigVersion
from heliostat.models.jobs import MASK
from store.tables import clouds, clusters, compute_configs

_LIST = {"cluster": "clusters", "job": "jobs", "schedule": "schedules", "service": "services"}

TAG_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
MAX_TAGS = 50


async def find(
    conn: AsyncConnection, table: Table, noun: str, prefix: str, caller: Caller, ref: str, project: str | None = None
) -> Row[Any]:
    """The row with this id; else the newest of this name, where a living one comes first. Raises NotFound, and
    Conflict when several of the caller's projects have that name."""
    scope = table.c.project_id.in_(caller.scope(project))
    visible = [scope] if "withdrawn" not in table.c else [scope, table.c.withdrawn.is_(False)]
    row: Row[Any] | None = None
    if is_id(ref, prefix):
        row = (await conn.execute(select(table).where(table.c.id == ref, *visible))).first()
    if row is None:
        living: list[ColumnElement[Any]] = [table.c.live_name.is_(None)] if "live_name" in table.c else []
        named = select(table).where(table.c.name == ref, *visible)
        row = (
            await conn.execute(named.order_by(*living, table.c.created_at.desc(), table.c.id.desc()).limit(1))
        ).first()
        if row is not None and len(caller.scope(project)) > 1:
            owners = select(table.c.project_id).where(table.c.name == ref, *visible).distinct()
            if len((await conn.execute(owners)).all()) > 1:
                raise Conflict(
                    f"Several of your projects have a {noun} named {ref!r}.",
                    remedy="Give its id, or name the project with ?project=.",
                    resource=ref,
                )
    if row is None:
        raise NotFound(
            f"There is no {noun} {ref!r}, or it is not in a project of yours.",
            remedy=f"GET /v1/{_LIST[noun]} lists those that you can see.",
            resource=ref,
        )
    return row


async def cloud(conn: AsyncConnection, caller: Caller, ref: str | None, field: str = "cloud") -> Cloud:
    """By name or id; None: the default one."""
    which = clouds.c.is_default.is_(True) if ref is None else (clouds.c.id == ref) | (clouds.c.name == ref)
    mine = (clouds.c.organization_id == caller.organization_id) & clouds.c.deleted_at.is_(None)
    row = (await conn.execute(select(clouds).where(mine, which).order_by(clouds.c.name).limit(1))).first()
    if row is None:
        known = ", ".join(await conn.scalars(select(clouds.c.name).where(mine).order_by(clouds.c.name))) or "none"
        what = f"There is no cloud {ref!r}" if ref is not None else "There is no default cloud"
        raise NotFound(f"{what}.", remedy=f"Name one of these: {known}.", resource=ref, field=field)
    return Cloud.model_validate(row._mapping)


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


async def shape(
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


async def usable_cluster(conn: AsyncConnection, caller: Caller, project: Project, ref: str) -> tuple[Row[Any], Cluster]:
    """An existing cluster that a job may run on: of its project, and not ending."""
    try:
        row = await find(conn, clusters, "cluster", "cl", caller, ref, project.id)
    except NotFound as e:
        e.field = "cluster"
        raise
    cluster = Cluster.model_validate(row.doc)
    if cluster.state.settled or cluster.state == "TERMINATING":
        raise Conflict(
            f"Cluster {cluster.name} is {cluster.state}" + (f": {cluster.reason}" if cluster.reason else "") + ".",
            remedy="Name a cluster that lives, or leave 'cluster' out to get one of the job's own.",
            resource=cluster.id,
            field="cluster",
        )
    return row, cluster


def check_tags(tags: dict[str, str], field: str = "tags") -> None:
    if len(tags) > MAX_TAGS:
        raise InvalidRequest(f"{len(tags)} tags are too many.", remedy=f"Give at most {MAX_TAGS}.", field=field)
    for key, value in tags.items():
        if not TAG_KEY.fullmatch(key) or len(value) > 255:
            raise InvalidRequest(
                f"Tag {key!r} is refused.",
                remedy="Keys: up to 63 of A-Z a-z 0-9 . _ / -, not starting with a sign; values: up to 255 characters.",
                field=field,
            )


def check_env(env_vars: dict[str, str], field: str = "env_vars") -> None:
    for key, value in env_vars.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) or "\0" in value:
            raise InvalidRequest(
                f"{key!r} can't be an environment variable.", remedy="Use letters, digits and _.", field=field
            )
        if value == MASK:
            raise InvalidRequest(
                f"The value of {key!r} is the mask that answers show instead of it.",
                remedy="Send the value itself; we do not give it out.",
                field=f"{field}.{key}",
            )
