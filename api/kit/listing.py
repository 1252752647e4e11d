"""One way to list: newest first, in pages with an opaque cursor; and the filters that several nouns share."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, TypeVar

from fastapi import Query

from api.kit.context import Context
from heliostat.errors import InvalidRequest
from heliostat.models.common import Event, Page
from store.database import AsyncConnection
from store.events import list_events
from store.pages import Found, PageRequest, Position

Item = TypeVar("Item")

Limit = Annotated[int, Query(ge=1, le=500, description="The maximum number of items on this page.")]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before.")]
Tags = Annotated[list[str], Query(description="`key:value`; values of one key are ORed, keys are ANDed.")]

Find = Callable[[AsyncConnection, PageRequest], Awaitable[Found[Item]]]
"""Finds one page of what the caller may see."""


async def list_page(ctx: Context, find: Find[Item], limit: int, cursor: str | None) -> Page[Item]:
    page = PageRequest(limit, _decode(cursor) if cursor is not None else None)
    async with ctx.db.read() as conn:
        found = await find(conn, page)
    return Page(items=found.items, next_cursor=_encode(found.last) if found.last is not None else None)


async def events_page(
    ctx: Context, find_id: Callable[[AsyncConnection], Awaitable[str]], limit: int, cursor: str | None
) -> Page[Event]:
    """The events of one resource, oldest first. ``find_id``: checks that the caller may see it."""

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[Event]:
        return await list_events(conn, await find_id(conn), page)

    return await list_page(ctx, find, limit, cursor)


def parse_tags(tags: list[str]) -> dict[str, list[str]]:
    """``tag=team:ml&tag=team:web&tag=stage:prod`` → (team is ml or web) and stage is prod. ``key=value`` works too."""
    wanted: dict[str, list[str]] = {}
    for tag in tags:
        at = min((i for i in (tag.find(":"), tag.find("=")) if i > 0), default=-1)
        key, value = tag[:at], tag[at + 1 :]
        if at < 1 or '"' in key:
            raise InvalidRequest(f"{tag!r} is not a valid tag filter.", remedy="Write tag=key:value.", field="tag")
        wanted.setdefault(key, []).append(value)
    return wanted


def _encode(position: Position) -> str:
    at, id = position
    return base64.urlsafe_b64encode(json.dumps([at.isoformat(), id]).encode()).decode().rstrip("=")


def _decode(cursor: str) -> Position:
    try:
        at, id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return datetime.fromisoformat(at).astimezone(UTC), str(id)
    except (binascii.Error, ValueError, TypeError):
        raise InvalidRequest(
            "The cursor is not valid.", remedy="Send next_cursor of the page before, unchanged.", field="cursor"
        ) from None
