"""Finds what a request names, by name or id. What belongs to others is not found."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from api.kit.callers import Caller, Project
from heliostat.errors import Conflict, NotFound
from heliostat.models.clouds import Cloud
from store.clouds import cloud_names, find_cloud
from store.clusters import ClusterRow, find_cluster
from store.database import AsyncConnection
from store.jobs import JobRow, find_job
from store.lookup import Match
from store.pages import Filters
from store.schedules import ScheduleRow, find_schedule
from store.services.find import find_service
from store.services.rows import ServiceRow

Row = TypeVar("Row")


async def cluster(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> ClusterRow:
    return _one("cluster", ref, await find_cluster(conn, me.scope(project), ref))


async def job(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> JobRow:
    """By id, or the newest by name."""
    return _one("job", ref, await find_job(conn, me.scope(project), ref))


async def schedule(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> ScheduleRow:
    return _one("schedule", ref, await find_schedule(conn, me.scope(project), ref))


async def service(conn: AsyncConnection, me: Caller, ref: str, project: str | None) -> ServiceRow:
    return _one("service", ref, await find_service(conn, me.scope(project), ref))


def _one(noun: str, ref: str, found: Match[Row]) -> Row:
    if found.ambiguous:
        raise Conflict(
            f"Several of your projects have a {noun} named {ref!r}.",
            remedy="Give its id, or name the project with ?project=.",
            resource=ref,
        )
    if found.row is None:
        raise NotFound(
            f"There is no {noun} {ref!r}, or it is not in one of your projects.",
            remedy=f"GET /v1/{noun}s lists those that you can see.",
            resource=ref,
        )
    return found.row


async def cloud(conn: AsyncConnection, me: Caller, ref: str | None) -> Cloud:
    """None: the default one."""
    found = await find_cloud(conn, me.organization_id, ref)
    if found is None:
        known = ", ".join(await cloud_names(conn, me.organization_id)) or "none"
        what = f"There is no cloud {ref!r}" if ref is not None else "There is no default cloud"
        raise NotFound(f"{what}.", remedy=f"Name one of these: {known}.", resource=ref, field="cloud")
    return found


async def usable_cluster(conn: AsyncConnection, me: Caller, project: Project, ref: str) -> ClusterRow:
    """An existing cluster that a job may run on: of its project, and not ending."""
    try:
        row = await cluster(conn, me, ref, project.id)
    except NotFound as e:
        e.field = "cluster"
        raise
    found = row.cluster
    if found.state.settled or found.state == "TERMINATING":
        raise Conflict(
            f"Cluster {found.name} is {found.state}" + (f": {found.reason}" if found.reason else "") + ".",
            remedy="Name a cluster that has not ended, or leave out 'cluster' to get one for this job.",
            resource=found.id,
            field="cluster",
        )
    return row


async def on_cloud(conn: AsyncConnection, me: Caller, filters: Filters, ref: str | None) -> Filters:
    """``filters`` of a list, for one cloud if it is named."""
    return filters if ref is None else replace(filters, cloud_id=(await cloud(conn, me, ref)).id)
