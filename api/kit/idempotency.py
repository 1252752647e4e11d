"""Idempotency keys: the same request again gets the same answer and makes nothing twice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from sqlalchemy import bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.errors import Conflict, InvalidRequest
from heliostat.models.common import new_id, utcnow
from runtime.keys import Keys
from store.database import Database, insert_new
from store.tables import accepted

_EARLIER = select(accepted.c.resource_id, accepted.c.body_sha256).where(
    accepted.c.project_id == bindparam("owner"), accepted.c.key == bindparam("its_key")
)
TOLD = "od"
"""Ids of orders that make nothing: retention takes them by their age."""


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
