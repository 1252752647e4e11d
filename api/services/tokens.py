"""Tokens that requests to a service carry: one, or two while one replaces the other.

The rows are the truth. A change is written there first and is *pending*; then the workflow gets the whole set, which
its proxies apply; then it is *acknowledged*. If a process dies in between, whatever comes next sends the pending
change: the same call repeated, any other call about the service's tokens, or this API when it starts. Sending is
repeatable, for it is always the whole set. A deleted token stays in the row until its deletion is acknowledged.
A deploy carries the tokens too, as of when it was accepted: so pending deploys are delivered first.
"""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Response

from api.kit import lookup
from api.kit.auth import Me
from api.kit.commands import send
from api.kit.context import Context, Ctx
from api.kit.idempotency import IdempotencyKey, Key, find_previous, reserve
from api.kit.temporal import UPDATE_S
from api.services.checks import check_state
from api.services.rows import new_token
from api.services.target import target_of
from api.services.view import decrypted
from heliostat.errors import Conflict, HeliostatError, NotFound, Unavailable
from heliostat.models.services import QueryToken, ServiceState
from runtime.messages.common import SYSTEM
from store.database import AsyncConnection
from store.encrypted_values import delete_sealed, write_sealed
from store.services.rows import ServiceRow, load_service, lock_service
from store.services.tokens import pending_tokens, write_tokens

log = structlog.get_logger(__name__)
router = APIRouter()

MAX_TOKENS = 2
TOKENS_S = 60.0
"""For a few updates of at most ``UPDATE_S`` each, and the reads and writes between them."""


@router.post("/{ref}/tokens", status_code=201)
async def add(ctx: Ctx, me: Me, key: Key, ref: str, project: str | None = None) -> QueryToken:
    """A second token. Requests may use it as soon as it is ``active``: GET the service to see it. The first one stays
    valid until it is deleted."""
    async with ctx.db.read() as conn:
        found = await lookup.service(conn, me, ref, project)
        previous = await find_previous(conn, found.project_id, key)
    token_id = previous or await _add(ctx, found.id, found.project_id, key)
    await send_tokens(ctx, found.id, me.actor)
    row = await load_service(ctx.db, found.id)
    token = next((t for t in row.valid_tokens if t.id == token_id), None) if row is not None else None
    if row is None or token is None:
        raise NotFound(f"Token {token_id} was deleted meanwhile.", resource=found.id)
    return await decrypted(ctx, row, token)


async def _add(ctx: Context, id: str, project_id: str, key: IdempotencyKey) -> str:
    async with ctx.db.begin() as conn:
        row = await _locked(conn, id)
        if not row.gate.enabled:
            raise Conflict(
                f"Requests to service {row.name} need no token.",
                remedy="That is fixed for its life: deploy with query_auth_token_enabled under another name.",
                resource=id,
            )
        token, stored = new_token(acknowledged=False)
        pending = [t for t in row.valid_tokens[1:] if not t.told]
        if pending and row.state != ServiceState.TERMINATED:
            stored = pending[0]  # added by a call that gave no answer: nobody has seen it
        elif len(row.valid_tokens) >= MAX_TOKENS:
            raise Conflict(
                f"Service {row.name} has {MAX_TOKENS} tokens already.", remedy="Delete one of them first.", resource=id
            )
        previous = await reserve(conn, project_id, key, stored.id)
        if previous is not None:
            return previous
        if stored not in row.tokens:
            await write_sealed(conn, ctx.keys, stored.id, project_id, {"token": token})
            await write_tokens(conn, id, [*row.tokens, stored])
    return stored.id


@router.delete("/{ref}/tokens", status_code=204)
async def remove(
    ctx: Ctx,
    me: Me,
    ref: str,
    id: Annotated[str | None, Query(description="Default: the primary one; the other takes its place.")] = None,
    project: str | None = None,
) -> Response:
    """Requests with this token are refused from then on. The last one can't be deleted."""
    async with ctx.db.read() as conn:
        service_id = (await lookup.service(conn, me, ref, project)).id
    await _remove(ctx, service_id, id)
    await send_tokens(ctx, service_id, me.actor)
    return Response(status_code=204)


async def _remove(ctx: Context, service_id: str, token_id: str | None) -> None:
    async with ctx.db.begin() as conn:
        row = await _locked(conn, service_id)
        valid, deleted = row.valid_tokens, [t for t in row.tokens if t.deleted]
        if any(t.id == token_id for t in deleted) or (token_id is None and len(valid) == 1 and deleted):
            return  # by a call that gave no answer; the deletion is sent again
        chosen = next((t for t in valid if token_id in (None, t.id)), None)
        if chosen is None:
            raise NotFound(
                f"Service {row.name} has no token {token_id!r}.", remedy="GET it to see its tokens.", resource=row.id
            )
        if len(valid) == 1:
            raise Conflict(
                f"It is the only token of service {row.name}.",
                remedy="Add the token that is to replace it first.",
                resource=row.id,
            )
        if row.state == ServiceState.TERMINATED:  # no workflow has to acknowledge it
            tokens = [t for t in row.tokens if t.id != chosen.id]
            await delete_sealed(conn, chosen.id)
        else:
            gone = chosen.model_copy(update={"deleted": True})
            tokens = [gone if t.id == chosen.id else t for t in row.tokens]
        await write_tokens(conn, service_id, tokens)


async def _locked(conn: AsyncConnection, id: str) -> ServiceRow:
    row = await lock_service(conn, id)
    if row is None:
        raise NotFound(f"Service {id} was deleted meanwhile.", resource=id)
    check_state(row)
    return row


async def send_tokens(ctx: Context, service_id: str, actor: str) -> None:
    """Makes the service's workflow use the tokens of the row.

    Raises:
        Unavailable: Temporal is unreachable; the change stays pending and is delivered later.
        Conflict: the service has no workflow.
    """
    row = await load_service(ctx.db, service_id)
    if row is None or not row.has_pending_tokens:
        return
    delivered = False

    async def update() -> None:
        nonlocal delivered
        delivered = await ctx.outbox.deliver_tokens(service_id, actor, UPDATE_S)

    target = target_of(ctx, row)
    try:
        if target.ended or not await send(target, update, TOKENS_S):
            return  # its next deploy delivers them
    except Unavailable as e:
        e.message = f"The change is stored, but the service's proxies do not know it yet: {e.message}"
        raise
    if not delivered:
        raise Unavailable(
            f"Concurrent requests change the tokens of service {service_id}.", remedy="Try again.", resource=service_id
        )


async def reconcile_all(ctx: Context) -> None:
    """At start: delivers the changes that another process has left pending."""
    for service_id in await pending_tokens(ctx.db):
        try:
            await send_tokens(ctx, service_id, SYSTEM)
        except HeliostatError as e:
            log.warning("tokens are still pending", resource=service_id, why=str(e))
