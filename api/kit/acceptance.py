"""One way to accept a resource: a request becomes rows, then a workflow, then a 201. What is accepted is durable,
whatever fails afterwards.

The order: check everything; write in one transaction the Idempotency-Key's reservation, the resource's row (``started``
false) and its encrypted env values; start the workflow, whose id is the resource's. If this process dies in between,
the monitor starts the row's workflow. If Temporal is unreachable, the row is cancelled, so that a refusal stays a
refusal: a workflow that was started after all finds its row cancelled and does nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol, TypeVar

from api.kit.context import Context
from api.kit.idempotency import IdempotencyKey, find_previous, reserve
from api.kit.temporal import calling
from heliostat.errors import HeliostatError, NotFound, Unavailable
from heliostat.models.common import Event, utcnow
from store.acceptance import Kind, confirm_started
from store.database import AsyncConnection
from store.events import insert_event
from store.idempotency import release_key

Resource_co = TypeVar("Resource_co", covariant=True)
Resource = TypeVar("Resource")


class Acceptable(Protocol[Resource_co]):
    """One request for a resource. ``accept`` calls these in this order."""

    @property
    def kind(self) -> Kind: ...
    @property
    def id(self) -> str: ...
    @property
    def project_id(self) -> str: ...

    async def check(self, conn: AsyncConnection) -> None:
        """All that the records can show to be wrong; raises it."""

    async def check_code(self) -> None:
        """The code that it names, in the cloud's bucket: without a connection, since a bucket may be slow."""

    async def write(self, conn: AsyncConnection) -> None:
        """Its rows."""

    async def start(self) -> None:
        """Its workflow; repeatable."""

    async def cancel(self, conn: AsyncConnection) -> bool:
        """Cancels its rows. False: its workflow exists."""

    async def answer(self) -> Resource_co: ...  # what the 201 shows

    async def repeat(self, id: str) -> Resource_co:
        """The answer to a repeated request, whose first one has created ``id``."""


async def accept(ctx: Context, key: IdempotencyKey, new: Acceptable[Resource]) -> Resource:
    async with ctx.db.read() as conn:
        previous = await find_previous(conn, new.project_id, key)
        if previous is None:
            await new.check(conn)
    if previous is not None:
        return await new.repeat(previous)
    await new.check_code()
    async with ctx.db.begin() as conn:
        previous = await reserve(conn, new.project_id, key, new.id)
        if previous is None:
            await new.write(conn)
    if previous is not None:
        return await new.repeat(previous)
    await _start(ctx, key, new)
    return await new.answer()


async def _start(ctx: Context, key: IdempotencyKey, new: Acceptable[Resource]) -> None:
    """Raises Unavailable when Temporal is unreachable."""
    try:
        async with calling():
            await new.start()
    except HeliostatError as e:
        async with ctx.db.begin() as conn:
            cancelled = await new.cancel(conn)
            if cancelled and key.key is not None:
                await release_key(conn, new.project_id, key.key)
        if cancelled:
            e.resource, e.message = new.id, f"The {new.kind} was not accepted: {e.message}"
            raise
        return  # its workflow runs: the call had arrived, or the monitor was faster
    ctx.started.add(new.id)


async def ensure_started(ctx: Context, kind: Kind, id: str, starting: Awaitable[None]) -> None:
    """For an accepted row that is not marked as started: its request may still run, or its process died. Only
    that request may cancel the row."""
    async with calling():
        await starting
    async with ctx.db.begin() as conn:
        if not await confirm_started(conn, kind, id):
            raise Unavailable(
                f"The {kind} was not accepted: Temporal did not answer.", remedy="Try again.", resource=id
            )


async def accepted_event(conn: AsyncConnection, resource_id: str, actor: str, message: str) -> None:
    """The resource's first event, before those of its workflow."""
    id = f"ev_{resource_id}_00000000_000"
    event = Event(id=id, resource_id=resource_id, at=utcnow(), kind="accepted", actor=actor, message=message)
    await insert_event(conn, event)


def deleted_by_retention(noun: str, id: str) -> NotFound:
    return NotFound(
        f"{noun} {id} has been deleted by the retention policy.", remedy="Use a new Idempotency-Key.", resource=id
    )
