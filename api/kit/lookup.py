"""What a request names, found in the records: names or ids everywhere, others' things are not found."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Row, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.kit.auth import Caller, Project
from heliostat.errors import Conflict, NotFound
from heliostat.models.clouds import Cloud
from heliostat.models.clusters import Cluster
from heliostat.models.common import is_id
from store.tables import clouds, clusters

_LIST = {"cluster": "clusters", "job": "jobs", "schedule": "schedules", "service": "services"}


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
