"""The events of one resource, newest first, page by page."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.kit.pagination import page
from heliostat.models.common import Event, Page
from store.tables import events


async def events_of(conn: AsyncConnection, resource_id: str, limit: int, cursor: str | None) -> Page[Event]:
    query = select(events).where(events.c.resource_id == resource_id)
    make = lambda r: Event.model_validate(r._mapping)  # noqa: E731
    return await page(conn, query, (events.c.at, events.c.id), make, limit, cursor, oldest_first=True)
