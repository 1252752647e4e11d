"""The state that workflows own, written for lists and history: rows of clusters, nodes, jobs and their events.

A write carries its workflow's revision: a smaller one than the row's changes nothing (a late write never
undoes a newer one), an equal one is a repeat. Every write is one transaction. A row that was withdrawn
(refused after all) takes no writes: the workflow is told by False and does nothing.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Table, Update, bindparam, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import Event
from store.database import Database, insert_new
from store.tables import clusters, events, jobs, services


def newer(table: Table) -> Update:
    """Of a row that takes writes, by one that is not older. Built once: these are the hottest statements."""
    c = table.c
    return update(table).where(
        c.id == bindparam("its_id"), c.revision <= bindparam("its_revision"), c.withdrawn.is_(False)
    )


async def add_events(db: Database, events: list[Event]) -> None:
    """Repeatable: an event's id is written once."""
    async with db.begin() as conn:
        await insert_events(conn, events)


_TABLES = {"cluster": clusters, "job": jobs, "service": services}


async def takes_writes(conn: AsyncConnection, table: Any, id: str) -> bool:
    withdrawn = await conn.scalar(select(table.c.withdrawn).where(table.c.id == id))
    return withdrawn is False or withdrawn == 0


async def insert_events(conn: AsyncConnection, items: list[Event]) -> None:
    for event in items:
        await insert_new(conn, events, event.model_dump())
