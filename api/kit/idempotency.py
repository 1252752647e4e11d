"""Idempotency keys: a repeated request gets the same answer and creates nothing twice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from api.kit.context import Ctx
from heliostat.errors import Conflict, InvalidRequest
from heliostat.models.common import new_id
from store.database import AsyncConnection, Database
from store.idempotency import find_reservation, reserve_key

COMMAND_PREFIX = "od"
"""Of the ids of requests that create nothing: retention deletes them by age."""


@dataclass(frozen=True)
class IdempotencyKey:
    """What tells one request from another one."""

    key: str | None
    """The Idempotency-Key; None: every request is a new one."""
    digest: str
    """Of method, path, query and body: the key may not be used for anything else."""


async def _key(
    ctx: Ctx,
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(description="The same key with the same body returns the same resource; another body is 409."),
    ] = None,
) -> IdempotencyKey:
    if idempotency_key is not None and not (1 <= len(idempotency_key) <= 255 and idempotency_key.isprintable()):
        raise InvalidRequest(
            "The Idempotency-Key is not valid.", remedy="Use 1 to 255 printable characters.", field="Idempotency-Key"
        )
    if idempotency_key is None:
        return IdempotencyKey(None, "")
    raw = await request.body()
    try:
        body = json.dumps(json.loads(raw), sort_keys=True) if raw else ""
    except ValueError:
        body = raw.decode(errors="replace")
    parts = json.dumps([request.method, request.url.path, request.url.query, body])
    return IdempotencyKey(idempotency_key, ctx.keys.digest(parts.encode()))


Key = Annotated[IdempotencyKey, Depends(_key)]


async def find_previous(conn: AsyncConnection, owner_id: str, key: IdempotencyKey) -> str | None:
    """The id of what a previous request with this key has created. ``owner_id``: the project, or the organization for
    resources outside of projects. Raises Conflict when the key was used for another request."""
    if key.key is None:
        return None
    found = await find_reservation(conn, owner_id, key.key)
    if found is None:
        return None
    if found.digest != key.digest:
        raise Conflict(
            f"The Idempotency-Key {key.key!r} was used for another request.",
            remedy="Use a new key for a new request, and the old one only to repeat its request.",
            resource=found.resource_id,
            field="Idempotency-Key",
        )
    return found.resource_id


async def reserve(conn: AsyncConnection, owner_id: str, key: IdempotencyKey, resource_id: str) -> str | None:
    """Takes the key for this resource, in the transaction that writes it. The id of another resource when a concurrent
    request with this key was faster; then nothing may be written."""
    if key.key is None:
        return None
    while not await reserve_key(conn, owner_id, key.key, key.digest, resource_id):
        previous = await find_previous(conn, owner_id, key)
        if previous is not None:
            return previous
        # Its owner released it between the two statements, because its request was cancelled: it is free again.
    return None


async def reserve_for_command(db: Database, owner_id: str, key: IdempotencyKey) -> None:
    """Fixes the key to a request that creates nothing but sends a command, which its workflow carries out once per key.
    Raises Conflict when the key was used for another request."""
    if key.key is None:
        return
    async with db.begin() as conn:
        await reserve(conn, owner_id, key, new_id(COMMAND_PREFIX))
