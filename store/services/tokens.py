"""The query tokens of services, and which of their workflows may not know them yet."""

from __future__ import annotations

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.services import ServiceState
from runtime.messages.services import GateTokens
from store.database import Database
from store.services.rows import StoredToken, lock_service, service_row
from store.tables import sealed, services


async def pending_tokens(db: Database) -> list[str]:
    """The services whose workflow may not know of a change of their tokens: see ``Outbox.deliver_tokens``."""
    async with db.read() as conn:
        rows = await conn.execute(
            select(services).where(services.c.withdrawn.is_(False), services.c.state != ServiceState.TERMINATED)
        )
        found = [service_row(r) for r in rows]
    return [row.id for row in found if row.has_pending_tokens]


async def acknowledge_tokens(db: Database, service_id: str, gate: GateTokens) -> None:
    """The workflow has exactly these. What has changed since stays pending."""
    async with db.begin() as conn:
        row = await lock_service(conn, service_id)
        if row is None:
            return
        kept, gone = [], []
        for token in row.tokens:
            known = token.sha256 in gate.hashes
            if token.deleted and not known:
                gone.append(token.id)
            else:
                kept.append(token if token.deleted or not known else token.model_copy(update={"told": True}))
        if kept != row.tokens:
            await write_tokens(conn, service_id, kept)
            await conn.execute(delete(sealed).where(sealed.c.id.in_(gone)))


async def write_tokens(conn: AsyncConnection, service_id: str, tokens: list[StoredToken]) -> None:
    """Call with the row locked."""
    value = [t.model_dump(mode="json") for t in tokens]
    await conn.execute(update(services).where(services.c.id == service_id).values(tokens=value))
