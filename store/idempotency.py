"""Idempotency keys of requests, and the ids that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import utcnow
from store.database import insert_new
from store.tables import accepted

# Built once: every creating request asks this.
_FIND = select(accepted.c.resource_id, accepted.c.body_sha256).where(
    accepted.c.project_id == bindparam("owner"), accepted.c.key == bindparam("its_key")
)


@dataclass(frozen=True)
class Reservation:
    resource_id: str
    digest: str
    """Of the request that the key was used for."""


async def find_reservation(conn: AsyncConnection, owner_id: str, key: str) -> Reservation | None:
    row = (await conn.execute(_FIND, {"owner": owner_id, "its_key": key})).first()
    return None if row is None else Reservation(row.resource_id, row.body_sha256)


async def reserve_key(conn: AsyncConnection, owner_id: str, key: str, digest: str, resource_id: str) -> bool:
    """False: the key is taken."""
    row = {"key": key, "body_sha256": digest, "resource_id": resource_id, "created_at": utcnow()}
    return await insert_new(conn, accepted, {"project_id": owner_id, **row})


async def release_key(conn: AsyncConnection, owner_id: str, key: str) -> None:
    await conn.execute(delete(accepted).where(accepted.c.project_id == owner_id, accepted.c.key == key))
