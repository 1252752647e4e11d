"""Pages of a list: ordered by time and id, and what a page begins after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from sqlalchemy import Column, ColumnElement, Row, Select, Table, and_, or_
from sqlalchemy.ext.asyncio import AsyncConnection

Item = TypeVar("Item")
Made = TypeVar("Made")

Position = tuple[datetime, str]
"""When an item of the list was created, and its id."""


@dataclass(frozen=True)
class PageRequest:
    limit: int
    after: Position | None = None
    """Of the last item of the page before."""


@dataclass(frozen=True)
class Found(Generic[Item]):
    items: list[Item]
    last: Position | None
    """Of the last item, when more follow."""


@dataclass(frozen=True)
class Filters:
    """What the lists of clusters, jobs and services have in common. Empty and None: no filter."""

    project_ids: Sequence[str]
    states: Sequence[str] = ()
    name: str | None = None
    tags: dict[str, list[str]] = field(default_factory=dict)
    """By key: one of these values."""
    created_after: datetime | None = None
    created_before: datetime | None = None
    cloud_id: str | None = None

    def of(self, table: Table, tags_in: str = "doc") -> list[ColumnElement[bool]]:
        """Conditions on rows of ``table``; ``tags_in``: the column that holds the tags."""
        c = table.c
        conditions: list[ColumnElement[bool]] = [c.project_id.in_(self.project_ids), c.withdrawn.is_(False)]
        conditions += [c.state.in_(self.states)] if self.states else []
        conditions += [c[tags_in]["tags"][key].as_string().in_(values) for key, values in self.tags.items()]
        conditions += [c.name == self.name] if self.name is not None else []
        conditions += [c.created_at > self.created_after] if self.created_after else []
        conditions += [c.created_at < self.created_before] if self.created_before else []
        conditions += [c.cloud_id == self.cloud_id] if self.cloud_id is not None else []
        return conditions


async def read_page(
    conn: AsyncConnection,
    query: Select[Any],
    by: tuple[Column[datetime], Column[str]],
    make: Callable[[Row[Any]], Made],
    page: PageRequest,
    *,
    oldest_first: bool = False,
) -> Found[Made]:
    """One page of ``query`` ordered by time and id, ``by``: ids alone do not sort, some are derived."""
    at, id = by
    if page.after is not None:
        then, last = page.after
        if oldest_first:
            query = query.where(or_(at > then, and_(at == then, id > last)))
        else:
            query = query.where(or_(at < then, and_(at == then, id < last)))
    order = (at.asc(), id.asc()) if oldest_first else (at.desc(), id.desc())
    rows: Sequence[Row[Any]] = (await conn.execute(query.order_by(*order).limit(page.limit + 1))).all()
    more = len(rows) > page.limit
    position = (rows[page.limit - 1]._mapping[at], rows[page.limit - 1]._mapping[id]) if more else None
    return Found([make(r) for r in rows[: page.limit]], position)
