"""Env values, encrypted at rest; workflows carry a reference to them."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import utcnow
from runtime.keys import Keys
from store.database import Database, insert_new
from store.tables import sealed


async def write_sealed(conn: AsyncConnection, keys: Keys, id: str, project_id: str, value: dict[str, str]) -> None:
    """A user's env values, encrypted. Repeatable."""
    row = {"id": id, "project_id": project_id, "ciphertext": keys.seal(value), "created_at": utcnow()}
    await insert_new(conn, sealed, row)


async def read_sealed(db: Database, keys: Keys, id: str) -> dict[str, str] | None:
    """None: deleted by the retention policy. Only for an agent, never for an answer or a history."""
    async with db.read() as conn:
        ciphertext = await conn.scalar(select(sealed.c.ciphertext).where(sealed.c.id == id))
    return None if ciphertext is None else {str(k): str(v) for k, v in keys.open(ciphertext).items()}


async def delete_sealed(conn: AsyncConnection, id: str) -> None:
    await conn.execute(delete(sealed).where(sealed.c.id == id))
