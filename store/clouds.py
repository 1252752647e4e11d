"""The clouds that this installation has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from sqlalchemy import Row, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.clouds import AwsConfig, Capabilities, Cloud, GcpConfig, Provider
from heliostat.models.common import new_id, utcnow
from store.database import Database, insert
from store.tables import clouds, clusters, jobs, organizations, projects, schedules, services

NOUNS = ("cluster", "job", "service", "schedule")
NAMED = 5
"""Of what still lives on a cloud, so many are named of each kind."""


async def register_cloud(db: Database, name: str, provider: Provider, capabilities: Capabilities) -> str | None:
    """Gives the id of the cloud of that name on the control plane's own machine, made if there is none; what it can do
    is written down anew. The first cloud is the default one. Safe when several processes do it at once. None: no
    organization exists yet."""
    can = capabilities.model_dump(mode="json")
    async with db.begin() as conn:
        organization = await conn.scalar(select(organizations.c.id).order_by(organizations.c.id).limit(1))
        if organization is None:
            return None
        of_organization = clouds.c.organization_id == organization
        is_first = await conn.scalar(select(clouds.c.id).where(of_organization).limit(1)) is None
        row = {
            "id": new_id("cld"),
            "organization_id": organization,
            "name": name,
            "provider": provider.value,
            "is_default": is_first,
            "capabilities": can,
            "created_at": utcnow(),
        }
        await conn.execute(insert(conn, clouds).values(row).on_conflict_do_nothing())
        mine = of_organization & (clouds.c.name == name)
        await conn.execute(update(clouds).where(mine).values(capabilities=can, provider=provider.value))
        found: str | None = await conn.scalar(select(clouds.c.id).where(mine))
        return found


@dataclass(frozen=True)
class CloudRow:
    organization_id: str
    cloud: Cloud | None
    """None: this code can't read it, because newer code has written it or somebody has by hand."""
    id: str
    name: str
    why: str = ""


async def living(db: Database) -> list[CloudRow]:
    """Every cloud of every organization that was not deleted."""
    async with db.read() as conn:
        rows = (await conn.execute(select(clouds).where(clouds.c.deleted_at.is_(None)).order_by(clouds.c.id))).all()
    return [_read(row) for row in rows]


def _read(row: Row[Any]) -> CloudRow:
    try:
        return CloudRow(row.organization_id, Cloud.model_validate(row._mapping), row.id, row.name)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        why = f"its config can't be read ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        return CloudRow(row.organization_id, None, row.id, row.name, why)


async def load_config(db: Database, cloud_id: str) -> tuple[Provider, AwsConfig | GcpConfig] | None:
    """As it is now; None: there is no such cloud, or it is the control plane's own machine."""
    async with db.read() as conn:
        query = select(clouds.c.provider, clouds.c.config).where(clouds.c.id == cloud_id)
        row = (await conn.execute(query)).first()
    if row is None or row.config is None:
        return None
    provider = Provider(row.provider)
    return provider, (AwsConfig if provider == Provider.AWS else GcpConfig).model_validate(row.config)


async def on_other_clouds(
    db: Database, noun: Literal["cluster", "service"], ids: Iterable[str], cloud_id: str
) -> set[str]:
    """Those among ``ids`` that are on another cloud than this one."""
    table = {"cluster": clusters, "service": services}[noun]
    async with db.read() as conn:
        query = select(table.c.id).where(table.c.id.in_({*ids}), table.c.cloud_id != cloud_id)
        return set(await conn.scalars(query))


async def lives_on(conn: AsyncConnection, cloud_id: str, nouns: tuple[str, ...] = NOUNS) -> list[str]:
    """What of a cloud has not ended, e.g. ``cluster train (cl_…)``; schedules too, whose next turn would go there."""
    found: list[str] = []
    for noun, table in (("cluster", clusters), ("job", jobs), ("service", services)):
        if noun not in nouns:
            continue
        query = select(table.c.id, table.c.name).where(
            table.c.cloud_id == cloud_id, table.c.ended_at.is_(None), table.c.withdrawn.is_(False)
        )
        rows = (await conn.execute(query.order_by(table.c.created_at).limit(NAMED + 1))).all()
        found += [f"{noun} {row.name} ({row.id})" for row in rows[:NAMED]]
        found += [f"more {noun}s"] if len(rows) > NAMED else []
    if "schedule" not in nouns:
        return found
    query = (
        select(schedules.c.name, schedules.c.input)
        .join(projects, projects.c.id == schedules.c.project_id)
        .join(clouds, clouds.c.organization_id == projects.c.organization_id)
        .where(clouds.c.id == cloud_id)
    )
    return found + [f"schedule {row.name}" for row in await conn.execute(query) if row.input["cloud_id"] == cloud_id]
