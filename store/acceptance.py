"""Accepted rows on their way to a started workflow: the transitions that the API decides."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import null, update
from sqlalchemy.ext.asyncio import AsyncConnection

from store.tables import clusters, jobs, service_deploys

Kind = Literal["cluster", "job", "deploy"]

_TABLES = {"cluster": clusters, "job": jobs, "deploy": service_deploys}


async def mark_started(conn: AsyncConnection, ids: list[str]) -> None:
    """Their workflows exist. ``ids``: of any kinds."""
    for table in _TABLES.values():
        await conn.execute(update(table).where(table.c.id.in_(ids)).values(started=True))


async def confirm_started(conn: AsyncConnection, kind: Kind, id: str) -> bool:
    """Its workflow exists. False: the request that wrote the row has cancelled it."""
    table = _TABLES[kind]
    kept = await conn.execute(update(table).where(table.c.id == id, table.c.withdrawn.is_(False)).values(started=True))
    return bool(kept.rowcount)


async def cancel_accepted(conn: AsyncConnection, kind: Kind, id: str) -> bool:
    """Cancels a row whose workflow is not known to exist. False: it is."""
    table = _TABLES[kind]
    values: dict[str, Any] = {"withdrawn": True}
    if "live_name" in table.c:
        values["live_name"] = null()  # the name is free again
    cancelled = await conn.execute(
        update(table).where(table.c.id == id, table.c.started.is_(False), table.c.revision == 0).values(**values)
    )
    return bool(cancelled.rowcount)
