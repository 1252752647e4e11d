"""Tokens that requests to a service carry: one, or two while one takes the other's place.

The rows are the truth. A change is written there first, as *pending*; then the workflow gets the whole set, which its
proxies then use; then the row is *acknowledged* (``store/outbox.py``). A process that dies in between leaves a pending
change, which is delivered by the same call repeated, by any other call about the service's tokens, by the monitor, or
by this API when it starts. A deleted token stays in the row until the workflow has acknowledged its deletion.
"""

from __future__ import annotations

from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import delete

from api.kit import lookup
from api.kit.auth import Me
from api.kit.idempotency import Order, Ordered, claim, earlier
from api.kit.temporal import UPDATE_S, updating
from api.services.checks import check_state
from api.services.rows import new_token
from api.services.view import opened
from heliostat.errors import Conflict, HeliostatError, NotFound, Unavailable
from heliostat.models.services import QueryToken, ServiceState
from runtime.messages.common import SYSTEM
from store.encrypted_values import write_sealed
from store.outbox import Outbox
from store.services.rows import load_service, lock_service
from store.services.tokens import pending_tokens, write_tokens
from store.tables import sealed, services

log = structlog.get_logger(__name__)
router = APIRouter()

MAX_TOKENS = 2


@router.post("/{ref}/tokens", status_code=201)
async def add(request: Request, me: Me, order: Ordered, ref: str, project: str | None = None) -> QueryToken:
    """A second token. It counts for a request as soon as it is ``active``: GET the service to see it. The first one
    goes on to count until it is deleted."""
    state = request.app.state
    async with state.db.read() as conn:
        found = await lookup.find(conn, services, "service", "svc", me, ref, project)
        before = await earlier(conn, found.project_id, order)
    token_id = before or await _add(state, found.id, found.project_id, order)
    await tell(state, found.id, me.actor)
    row = await load_service(state.db, found.id)
    token = next((t for t in row.valid_tokens if t.id == token_id), None) if row is not None else None
    if row is None or token is None:
        raise NotFound(f"Token {token_id} was deleted meanwhile.", resource=found.id)
    return await opened(state, row, token)


async def _add(state: Any, id: str, project_id: str, order: Order) -> str:
    async with state.db.begin() as conn:
        row = await lock_service(conn, id)
        if row is None:
            raise NotFound(f"Service {id} was deleted meanwhile.", resource=id)
        check_state(row)
        if not row.gate.enabled:
            raise Conflict(
                f"Requests to service {row.name} need no token.",
                remedy="That is fixed for its life: deploy with query_auth_token_enabled under another name.",
                resource=id,
            )
        token, stored = new_token(told=False)
        untold = [t for t in row.valid_tokens[1:] if not t.told]
        if untold and row.state != ServiceState.TERMINATED:
            stored = untold[0]  # made by a call that gave no answer: nobody has seen it
        elif len(row.valid_tokens) >= MAX_TOKENS:
            raise Conflict(
                f"Service {row.name} has {MAX_TOKENS} tokens already.", remedy="Delete one of them first.", resource=id
            )
        if not await claim(conn, project_id, order, stored.id):
            other = await earlier(conn, project_id, order)
            assert other is not None
            return other
        if stored not in row.tokens:
            await write_sealed(conn, state.keys, stored.id, project_id, {"token": token})
            await write_tokens(conn, id, [*row.tokens, stored])
    return stored.id


@router.delete("/{ref}/tokens", status_code=204)
async def remove(
    request: Request,
    me: Me,
    ref: str,
    id: Annotated[str | None, Query(description="Default: the primary one; the other takes its place.")] = None,
    project: str | None = None,
) -> Response:
    """Requests with this token are refused from then on. The last one stays."""
    state = request.app.state
    async with state.db.read() as conn:
        service_id = (await lookup.find(conn, services, "service", "svc", me, ref, project)).id
    await _remove(state, service_id, id)
    await tell(state, service_id, me.actor)
    return Response(status_code=204)


async def _remove(state: Any, service_id: str, token_id: str | None) -> None:
    async with state.db.begin() as conn:
        row = await lock_service(conn, service_id)
        if row is None:
            raise NotFound(f"Service {service_id} was deleted meanwhile.", resource=service_id)
        check_state(row)
        valid, deleted = row.valid_tokens, [t for t in row.tokens if t.deleted]
        if any(t.id == token_id for t in deleted) or (token_id is None and len(valid) == 1 and deleted):
            return  # by a call that gave no answer; it is told again
        chosen = next((t for t in valid if token_id in (None, t.id)), None)
        if chosen is None:
            raise NotFound(
                f"Service {row.name} has no token {token_id!r}.", remedy="GET it to see its tokens.", resource=row.id
            )
        if len(valid) == 1:
            raise Conflict(
                f"It is the only token of service {row.name}.",
                remedy="Add the one that is to take its place first.",
                resource=row.id,
            )
        if row.state == ServiceState.TERMINATED:  # nobody to be told
            tokens = [t for t in row.tokens if t.id != chosen.id]
            await conn.execute(delete(sealed).where(sealed.c.id == chosen.id))
        else:
            gone = chosen.model_copy(update={"deleted": True})
            tokens = [gone if t.id == chosen.id else t for t in row.tokens]
        await write_tokens(conn, service_id, tokens)


async def tell(state: Any, service_id: str, actor: str) -> None:
    """Makes the service's workflow use the tokens of the row (``Outbox.deliver_tokens``).

    Raises:
        Unavailable: Temporal does not answer; the change stands, and is delivered later.
        Conflict: the service has no workflow.
    """
    outbox = Outbox(state.db, state.temporal, state.settings.task_queue)
    try:
        async with updating("service", service_id):
            delivered = await outbox.deliver_tokens(service_id, actor, UPDATE_S)
    except Unavailable as e:
        e.message = f"The change is noted, but the service's proxies do not know it yet: {e.message}"
        raise
    except NotFound as e:
        await only_ended(state, service_id, e)
        return
    if not delivered:
        raise Unavailable(
            f"The tokens of service {service_id} change all the time.", remedy="Try again.", resource=service_id
        )


async def only_ended(state: Any, id: str, error: HeliostatError) -> None:
    """Its workflow has ended just now, which is fine, or somebody ended it in Temporal, which is not."""
    row = await load_service(state.db, id)
    if row is None or row.withdrawn or row.state == ServiceState.TERMINATED:
        return
    raise Conflict(
        f"The workflow of service {id} is gone: somebody ended it in Temporal.",
        remedy="Deploy to the service to start it again; then it can be terminated.",
        resource=id,
    ) from error


async def reconcile_all(state: Any) -> None:
    """At start: delivers what a process before this one has left pending."""
    for service_id in await pending_tokens(state.db):
        try:
            await tell(state, service_id, SYSTEM)
        except HeliostatError as e:
            log.warning("tokens are still pending", resource=service_id, why=str(e))
