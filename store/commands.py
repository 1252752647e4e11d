"""Commands to heads: written by the activity that waits, fetched and answered by the head's agent."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import utcnow
from store.database import Database, insert
from store.tables import commands, nodes

_NODE_ENDED = {"ok": False, "result": {}, "error": "its node has ended", "retryable": False}


@dataclass(frozen=True)
class OpenCommand:
    id: str
    cluster_id: str
    node_id: str
    kind: str
    args: dict[str, Any]
    created_at: datetime


async def put_command(
    db: Database, id: str, cluster_id: str, node_id: str, kind: str, args: dict[str, Any], task_token: bytes
) -> dict[str, Any] | None:
    """Writes a command, or notes whom to answer now (the activity was tried again). The result, if it is done
    for good; a command that its agent could not even try (not ok, retryable) is opened again instead.
    To a node that has ended none is given."""
    async with db.begin() as conn:
        row = insert(conn, commands).values(
            id=id,
            cluster_id=cluster_id,
            node_id=node_id,
            kind=kind,
            args=args,
            task_token=task_token,
            done=False,
            created_at=utcnow(),
        )
        # Locks the row on PostgreSQL, so that a result that comes now is either seen below or waits for us.
        await conn.execute(row.on_conflict_do_update(index_elements=["id"], set_={"id": row.excluded.id}))
        result: dict[str, Any] | None = await conn.scalar(
            select(commands.c.result).where(commands.c.id == id, commands.c.done.is_(True))
        )
        if result is not None and (result.get("ok") or not result.get("retryable")):
            return result
        if await conn.scalar(select(nodes.c.ended_at).where(nodes.c.id == node_id)) is not None:
            await close_commands(conn, [node_id])
            return _NODE_ENDED
        await conn.execute(
            update(commands)
            .where(commands.c.id == id)
            .values(task_token=task_token, done=False, done_at=None, result=null())
        )
        return None


async def open_commands(db: Database, node_ids: list[str]) -> list[OpenCommand]:
    """All that are not finished of these nodes, oldest first: one query for every waiting head."""
    if not node_ids:
        return []
    c = commands.c
    async with db.read() as conn:
        rows = await conn.execute(
            select(c.id, c.cluster_id, c.node_id, c.kind, c.args, c.created_at)
            .where(c.done.is_(False), c.node_id.in_(node_ids))
            .order_by(c.created_at, c.id)
        )
        return [OpenCommand(*r) for r in rows]


async def finish_command(db: Database, id: str, node_id: str, result: dict[str, Any]) -> bytes | None:
    """Writes down the first result (a dumped ``CommandResult``), and returns the task token of the activity to
    complete; None: this node has no such command. A repeat changes nothing but returns the token again: the
    process that wrote the result may have died before it told Temporal, and completing twice does no harm."""
    async with db.begin() as conn:
        await conn.execute(
            update(commands)
            .where(commands.c.id == id, commands.c.node_id == node_id, commands.c.done.is_(False))
            .values(done=True, result=result, done_at=utcnow())
        )
        token: bytes | None = await conn.scalar(
            select(commands.c.task_token).where(commands.c.id == id, commands.c.node_id == node_id)
        )
        return token


async def close_commands(conn: AsyncConnection, node_ids: list[str]) -> None:
    """Of nodes that have ended: nobody will execute them, and every long poll would find them."""
    await conn.execute(
        update(commands)
        .where(commands.c.done.is_(False), commands.c.node_id.in_(node_ids))
        .values(done=True, result=_NODE_ENDED, done_at=utcnow())
    )
