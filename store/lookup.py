"""Rows by what people call them: a name or an id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Row, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import is_id

Made = TypeVar("Made")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Match(Generic[Found]):
    row: Found | None
    ambiguous: bool = False
    """Several of the projects have the name."""


async def find_row(
    conn: AsyncConnection,
    table: Table,
    prefix: str,
    make: Callable[[Row[Any]], Made],
    project_ids: Sequence[str],
    ref: str,
) -> Match[Made]:
    """The row with this id; else the newest of this name, where one that has not ended comes first."""
    scope = table.c.project_id.in_(project_ids)
    visible = [scope] if "withdrawn" not in table.c else [scope, table.c.withdrawn.is_(False)]  # words: ok
    if is_id(ref, prefix):
        row = (await conn.execute(select(table).where(table.c.id == ref, *visible))).first()
        if row is not None:
            return Match(make(row))
    living: list[ColumnElement[Any]] = [table.c.live_name.is_(None)] if "live_name" in table.c else []
    named = select(table).where(table.c.name == ref, *visible)
    row = (await conn.execute(named.order_by(*living, table.c.created_at.desc(), table.c.id.desc()).limit(1))).first()
    if row is None:
        return Match(None)
    if len(project_ids) > 1:
        owners = select(table.c.project_id).where(table.c.name == ref, *visible).distinct()
        if len((await conn.execute(owners)).all()) > 1:
            return Match(None, ambiguous=True)
    return Match(make(row))
