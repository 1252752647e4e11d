"""Lists: newest first, in pages, with an opaque cursor; and the filters that several nouns share."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import Query
from sqlalchemy import Column, ColumnElement, Row, Select, Table, and_, or_
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.errors import InvalidRequest
from heliostat.models.common import Page

Item = TypeVar("Item")

Limit = Annotated[int, Query(ge=1, le=500, description="At most so many items on this page.")]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before.")]
Tags = Annotated[list[str], Query(description="`key:value`; values of one key are ORed, keys are ANDed.")]


async def page(
    conn: AsyncConnection,
    query: Select[Any],
    by: tuple[Column[datetime], Column[str]],
    make: Callable[[Row[Any]], Item],
    limit: int,
    cursor: str | None,
    *,
    oldest_first: bool = False,
) -> Page[Item]:
    """One page of ``query`` ordered by time and id, ``by``: ids alone do not sort, some are derived."""
    at, id = by
    if cursor is not None:
        after = _decode(cursor)
        if oldest_first:
            query = query.where(or_(at > after[0], and_(at == after[0], id > after[1])))
        else:
            query = query.where(or_(at < after[0], and_(at == after[0], id < after[1])))
    order = (at.asc(), id.asc()) if oldest_first else (at.desc(), id.desc())
    rows: Sequence[Row[Any]] = (await conn.execute(query.order_by(*order).limit(limit + 1))).all()
    following = _encode(rows[limit - 1]._mapping[at], rows[limit - 1]._mapping[id]) if len(rows) > limit else None
    return Page(items=[make(r) for r in rows[:limit]], next_cursor=following)


def _encode(at: datetime, id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([at.isoformat(), id]).encode()).decode().rstrip("=")


def _decode(cursor: str) -> tuple[datetime, str]:
    try:
        at, id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return datetime.fromisoformat(at).astimezone(UTC), str(id)
    except (binascii.Error, ValueError, TypeError):
        raise InvalidRequest(
            "The cursor is not one of ours.", remedy="Take next_cursor of the page before, as it is.", field="cursor"
        ) from None


def tag_filter(table: Table, tags: list[str], column: str = "doc") -> list[ColumnElement[bool]]:
    """``tag=team:ml&tag=team:web&tag=stage:prod`` → (team is ml or web) and stage is prod. ``key=value`` works too.
    ``column``: that of the table in which the tags stand."""
    wanted: dict[str, list[str]] = {}
    for tag in tags:
        at = min((i for i in (tag.find(":"), tag.find("=")) if i > 0), default=-1)
        key, value = tag[:at], tag[at + 1 :]
        if at < 1 or '"' in key:
            raise InvalidRequest(f"{tag!r} is not a tag filter.", remedy="Write tag=key:value.", field="tag")
        wanted.setdefault(key, []).append(value)
    return [table.c[column]["tags"][key].as_string().in_(values) for key, values in wanted.items()]


def state_filter(table: Table, states: list[Any]) -> list[ColumnElement[bool]]:
    return [table.c.state.in_(states)] if states else []
