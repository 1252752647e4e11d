"""The events of resources."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import Event
from store.database import insert_new
from store.pages import Found, PageRequest, read_page
from store.tables import events


async def list_events(conn: AsyncConnection, resource_id: str, page: PageRequest) -> Found[Event]:
    """Oldest first."""
    query = select(events).where(events.c.resource_id == resource_id)
    by = (events.c.at, events.c.id)
    return await read_page(conn, query, by, lambda r: Event.model_validate(r._mapping), page, oldest_first=True)


async def insert_event(conn: AsyncConnection, event: Event) -> None:
    """Repeatable: an event's id is written once."""
    await insert_new(conn, events, event.model_dump())
