"""Accepting: a request becomes rows, then a workflow, then a 201. What is accepted is durable, whatever dies after.

The order is: read and check everything; one transaction with the ``accepted`` row (which fixes the resource's id
for its Idempotency-Key), the resource's row (``started`` false) and its sealed env values; start the workflow,
whose id is the resource's. A process that dies in between leaves a row that the monitor starts. If Temporal is
away, the row is withdrawn, so that a "no" stays a no: a workflow that was started after all finds the row
withdrawn and does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from sqlalchemy import Table, delete, null, update
from sqlalchemy.ext.asyncio import AsyncConnection

from api.kit.idempotency import Order
from api.kit.temporal import calling
from heliostat.errors import HeliostatError, Unavailable
from heliostat.models.common import Event, utcnow
from store.database import Database, insert_new
from store.tables import accepted, clusters, events, jobs, service_deploys

log = structlog.get_logger(__name__)
_TABLES = {"cluster": clusters, "job": jobs, "deploy": service_deploys}
Withdraw = Callable[[AsyncConnection], Awaitable[bool]]
"""Takes back what its workflow does not have; False: it has it."""
MARK_AFTER_S = 0.2
"""A write transaction for each start would be a third of what accepting costs; several share one."""


async def first_event(conn: AsyncConnection, resource_id: str, actor: str, message: str) -> None:
    """The first line of the resource's story, before its workflow's own."""
    event = Event(
        id=f"ev_{resource_id}_00000000_000",
        resource_id=resource_id,
        at=utcnow(),
        kind="accepted",
        actor=actor,
        message=message,
    )
    await insert_new(conn, events, event.model_dump())


async def start(
    state: Any,
    kind: str,
    id: str,
    owner_id: str,
    order: Order,
    starting: Awaitable[None],
    withdraw: Withdraw | None = None,
) -> None:
    """Starts the workflow of a row that this request has just written, or withdraws the row. ``withdraw``: for what is
    more than one row. Raises Unavailable when Temporal is away."""
    try:
        async with calling():
            await starting
    except HeliostatError as e:
        if await _withdraw(state.db, kind, id, owner_id, order, withdraw):
            e.resource, e.message = id, f"The {kind} was not accepted: {e.message}"
            raise
        return  # it runs: the call had arrived, or the monitor was faster
    state.started.append(id)
    if len(state.started) == 1:  # else the one that waits takes this along
        task = asyncio.create_task(_mark(state))
        state.background.add(task)
        task.add_done_callback(state.background.discard)


async def start_again(state: Any, kind: str, id: str, starting: Awaitable[None]) -> None:
    """For a repeat of a request whose first one may still be under way, or whose process died: makes sure that the
    workflow exists before this one says 201 too. Only the first request may withdraw the row."""
    async with calling():
        await starting
    table = _TABLES[kind]
    async with state.db.begin() as conn:
        kept = await conn.execute(
            update(table).where(table.c.id == id, table.c.withdrawn.is_(False)).values(started=True)
        )
        if not kept.rowcount:
            raise Unavailable(
                f"The {kind} was not accepted: Temporal did not answer.", remedy="Try again.", resource=id
            )


async def _withdraw(db: Database, kind: str, id: str, owner_id: str, order: Order, withdraw: Withdraw | None) -> bool:
    async with db.begin() as conn:
        gone = await (withdraw(conn) if withdraw is not None else _withdraw_row(conn, _TABLES[kind], id))
        if gone and order.key is not None:
            await conn.execute(delete(accepted).where(accepted.c.project_id == owner_id, accepted.c.key == order.key))
        return gone


async def _withdraw_row(conn: AsyncConnection, table: Table, id: str) -> bool:
    values: dict[str, Any] = {"withdrawn": True}
    if "live_name" in table.c:
        values["live_name"] = null()  # the name is free again
    gone = await conn.execute(
        update(table).where(table.c.id == id, table.c.started.is_(False), table.c.revision == 0).values(**values)
    )
    return bool(gone.rowcount)


async def _mark(state: Any) -> None:
    """Notes what was started lately, in one transaction. Nobody waits for it: should it fail, or this process die, the
    monitor starts the workflows again, which changes nothing."""
    await asyncio.sleep(MARK_AFTER_S)
    ids, state.started = state.started, []
    try:
        async with state.db.begin() as conn:
            for table in _TABLES.values():
                await conn.execute(update(table).where(table.c.id.in_(ids)).values(started=True))
    except Unavailable as e:
        log.warning("starts not noted", resources=ids, why=str(e))
