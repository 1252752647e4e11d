"""The clouds that this installation has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Row, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.clouds import AwsConfig, Capabilities, Cloud, GcpConfig, Provider
from heliostat.models.common import new_id, utcnow
from store.database import Database, insert
from store.pages import Found, PageRequest, read_page
from store.tables import clouds, clusters, jobs, organizations, projects, schedules, services

NOUNS = ("cluster", "job", "service", "schedule")
NAMED = 5
"""Of what still lives on a cloud, so many are named of each kind."""


async def register_cloud(db: Database, name: str, provider: Provider, capabilities: Capabilities) -> str | None:
    """Gives the id of the cloud of that name on the control plane's own machine, new if there is none; its capabilities
    are written again. The first cloud is the default one. Safe when several processes do it at once. None: no
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


# --- of one organization ------------------------------------------------------------------------------------


async def find_cloud(conn: AsyncConnection, organization_id: str, ref: str | None) -> Cloud | None:
    """By name or id; None: the default one."""
    which = clouds.c.is_default.is_(True) if ref is None else (clouds.c.id == ref) | (clouds.c.name == ref)
    query = select(clouds).where(_of(organization_id), which).order_by(clouds.c.name).limit(1)
    row = (await conn.execute(query)).first()
    return Cloud.model_validate(row._mapping) if row is not None else None


async def cloud_names(conn: AsyncConnection, organization_id: str) -> list[str]:
    return list(await conn.scalars(select(clouds.c.name).where(_of(organization_id)).order_by(clouds.c.name)))


async def list_clouds(conn: AsyncConnection, organization_id: str, page: PageRequest) -> Found[Cloud]:
    """Newest first."""
    query = select(clouds).where(_of(organization_id))
    by = (clouds.c.created_at, clouds.c.id)
    return await read_page(conn, query, by, lambda r: Cloud.model_validate(r._mapping), page)


async def lock_organizations(conn: AsyncConnection) -> None:
    """Until the transaction ends, other registrations and changes of clouds wait, in every organization."""
    await conn.execute(select(organizations.c.id).order_by(organizations.c.id).with_for_update(key_share=True))


async def lock_cloud(conn: AsyncConnection, cloud_id: str) -> None:
    """Until the transaction ends, what is accepted for it waits: its row refers to this one."""
    await conn.execute(select(clouds.c.id).where(clouds.c.id == cloud_id).with_for_update())


async def insert_cloud(conn: AsyncConnection, organization_id: str, cloud: Cloud) -> None:
    assert cloud.config is not None
    await conn.execute(
        clouds.insert().values(
            id=cloud.id,
            organization_id=organization_id,
            name=cloud.name,
            provider=cloud.provider.value,
            is_default=False,
            capabilities=cloud.capabilities.model_dump(mode="json"),
            config=cloud.config.model_dump(mode="json"),
            created_at=cloud.created_at,
        )
    )


async def change_cloud(
    conn: AsyncConnection, cloud_id: str, config: AwsConfig | GcpConfig, capabilities: Capabilities
) -> None:
    values = {"config": config.model_dump(mode="json"), "capabilities": capabilities.model_dump(mode="json")}
    await conn.execute(update(clouds).where(clouds.c.id == cloud_id).values(**values))


async def make_default(conn: AsyncConnection, organization_id: str, cloud_id: str) -> None:
    mine = clouds.c.organization_id == organization_id
    await conn.execute(update(clouds).where(mine).values(is_default=clouds.c.id == cloud_id))


async def delete_cloud(conn: AsyncConnection, cloud: Cloud) -> None:
    """Its row stays, for what ran there; its name is free again."""
    gone = {"deleted_at": utcnow(), "is_default": False, "name": f"{cloud.name[:38]}~{cloud.id}"}
    await conn.execute(update(clouds).where(clouds.c.id == cloud.id).values(**gone))


async def configs_of_others(conn: AsyncConnection, organization_id: str) -> list[dict[str, Any]]:
    """Configs of the clouds of other organizations, as JSON."""
    others = (clouds.c.organization_id != organization_id) & clouds.c.deleted_at.is_(None)
    return list(await conn.scalars(select(clouds.c.config).where(others, clouds.c.config.is_not(None))))


def _of(organization_id: str) -> ColumnElement[bool]:
    return (clouds.c.organization_id == organization_id) & clouds.c.deleted_at.is_(None)
