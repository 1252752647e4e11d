"""The newest report of each node, and since when the API can receive reports."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case, select
from sqlalchemy.ext.asyncio import AsyncConnection

from store.database import insert
from store.heartbeats import HEARING_GAP_S
from store.tables import hearing, reports


@dataclass(frozen=True)
class StoredReport:
    node_id: str
    cluster_id: str
    is_head: bool
    seq: int
    activity: str
    doc: dict[str, Any]
    """The report as JSON, without its facts."""
    at: datetime


async def write_reports(conn: AsyncConnection, items: list[StoredReport], now: datetime) -> None:
    """The reports, and that the API can receive them at ``now``."""
    if items:
        row = insert(conn, reports)
        new = row.excluded
        await conn.execute(
            row.on_conflict_do_update(
                index_elements=["node_id"],
                set_={k: new[k] for k in ("seq", "activity", "doc", "at")},
                where=new.at > reports.c.at,  # another API may have received a later one
            ),
            [vars(item) for item in items],
        )
    gap = hearing.c.last < now - timedelta(seconds=HEARING_GAP_S)
    await conn.execute(
        insert(conn, hearing)
        .values(id=1, since=now, last=now)
        .on_conflict_do_update(
            index_elements=["id"],
            set_={
                "since": case((gap, now), else_=hearing.c.since),
                "last": case((hearing.c.last < now, now), else_=hearing.c.last),
            },
        )
    )


async def last_received(conn: AsyncConnection) -> datetime | None:
    """When an API last noted that it can receive reports."""
    found: datetime | None = await conn.scalar(select(hearing.c.last))
    return found
