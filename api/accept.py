"""Accepting: a request becomes rows, then a workflow, then a 201. What is accepted is durable, whatever dies after.

The order is: read and check everything; one transaction with the ``accepted`` row (which fixes the resource's id
for its Idempotency-Key), the resource's row (``started`` false) and its sealed env values; start the workflow,
whose id is the resource's. A process that dies in between leaves a row that the monitor starts. If Temporal is
away, the row is withdrawn, so that a "no" stays a no: a workflow that was started after all finds the row
withdrawn and does nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import Depends, Header, Request
from sqlalchemy import Table, bindparam, delete, null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from api.temporal import calling
from heliostat.errors import Conflict, HeliostatError, InvalidRequest, Unavailable
from heliostat.models.common import Event, new_id, utcnow
from runtime.keys import Keys
from store.database import Database, insert_new
from store.tables import accepted, clusters, events, jobs, service_deploys

log = structlog.get_logger(__name__)

_EARLIER = select(accepted.c.resource_id, accepted.c.body_sha256).where(
    accepted.c.project_id == bindparam("owner"), accepted.c.key == bindparam("its_key")
)

_TABLES = {"cluster": clusters, "job": jobs, "deploy": service_deploys}

TOLD = "od"
"""Ids of orders that make nothing: retention takes them by their age."""

Withdraw = Callable[[AsyncConnection], Awaitable[bool]]
"""Takes back what its workflow does not have; False: it has it."""

MARK_AFTER_S = 0.2
"""A write transaction for each start would be a third of what accepting costs; several share one."""


@dataclass(frozen=True)
class Order:
    """One creating request, as it can be told from another one."""

    key: str | None
    """The Idempotency-Key; None: every request is a new one."""
    digest: str
    """Of method, path, query and body: the same key may not be used for anything else."""


async def _order(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(description="The same key with the same body returns the same resource; another body is 409."),
    ] = None,
) -> Order:
    if idempotency_key is not None and not (1 <= len(idempotency_key) <= 255 and idempotency_key.isprintable()):
        raise InvalidRequest(
            "The Idempotency-Key is not usable.", remedy="Use 1 to 255 printable characters.", field="Idempotency-Key"
        )
    if idempotency_key is None:
        return Order(None, "")
    raw = await request.body()
    try:
        body = json.dumps(json.loads(raw), sort_keys=True) if raw else ""
    except ValueError:
        body = raw.decode(errors="replace")
    keys: Keys = request.app.state.keys
    parts = json.dumps([request.method, request.url.path, request.url.query, body])
    return Order(idempotency_key, keys.digest(parts.encode()))


Ordered = Annotated[Order, Depends(_order)]


async def earlier(conn: AsyncConnection, owner_id: str, order: Order) -> str | None:
    """The id of what this order made before. ``owner_id``: the project, or the organization of what has none.
    Raises Conflict when the key was used for another request."""
    if order.key is None:
        return None
    row = (await conn.execute(_EARLIER, {"owner": owner_id, "its_key": order.key})).first()
    if row is None:
        return None
    if row.body_sha256 != order.digest:
        raise Conflict(
            f"The Idempotency-Key {order.key!r} was used for another request.",
            remedy="Use a new key for a new request, and an old one only to repeat the same.",
            resource=row.resource_id,
            field="Idempotency-Key",
        )
    resource_id: str = row.resource_id
    return resource_id


async def claim(conn: AsyncConnection, owner_id: str, order: Order, resource_id: str) -> bool:
    """Takes the key for this resource; False: another request was faster, and ``earlier`` tells its resource."""
    if order.key is None:
        return True
    row = {"key": order.key, "body_sha256": order.digest, "resource_id": resource_id, "created_at": utcnow()}
    return await insert_new(conn, accepted, {"project_id": owner_id, **row})


async def told_once(db: Database, owner_id: str, order: Order) -> None:
    """For a request that makes nothing but tells a workflow something, which the workflow takes once under a key: fixes
    the key to this request. Raises Conflict when it was used for another one."""
    if order.key is None:
        return
    async with db.begin() as conn:
        if not await claim(conn, owner_id, order, new_id(TOLD)):
            await earlier(conn, owner_id, order)


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
