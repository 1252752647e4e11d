"""The clouds that this installation has."""

from __future__ import annotations

from sqlalchemy import select, update

from heliostat.models.clouds import Capabilities, Provider
from heliostat.models.common import new_id, utcnow
from store.database import Database, insert
from store.tables import clouds, organizations


async def register_cloud(db: Database, name: str, provider: Provider, capabilities: Capabilities) -> str | None:
    """Gives the id of the cloud of that name, made if there is none; what it can do is written down anew. The
    first cloud is the default one. Safe when several processes do it at once. None: no organization exists yet."""
    can = capabilities.model_dump(mode="json")
    async with db.begin() as conn:
        organization = await conn.scalar(select(organizations.c.id).order_by(organizations.c.id).limit(1))
        if organization is None:
            return None
        of_organization = clouds.c.organization_id == organization
        is_first = await conn.scalar(select(clouds.c.id).where(of_organization).limit(1)) is None
        row = {
            "id": new_id("cld"),
            "organization_id": organization,
            "name": name,
            "provider": provider.value,
            "is_default": is_first,
            "capabilities": can,
            "created_at": utcnow(),
        }
        await conn.execute(insert(conn, clouds).values(row).on_conflict_do_nothing())
        mine = of_organization & (clouds.c.name == name)
        await conn.execute(update(clouds).where(mine).values(capabilities=can, provider=provider.value))
        found: str | None = await conn.scalar(select(clouds.c.id).where(mine))
        return found
