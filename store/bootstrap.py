"""What empty records need before the first request."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

from sqlalchemy import select

from heliostat.models.common import new_id, utcnow
from heliostat.models.users import Role
from store.database import Database, insert
from store.tables import memberships, organizations, projects, tokens, users

DEFAULT = "default"
ADMIN = "admin"


async def ensure_first(db: Database, keep_token: Callable[[str], None]) -> bool:
    """Makes the organization ``default``, its project ``default`` and the user ``admin`` with a token, unless there
    is an organization already. True: they were made now. Clouds are registered by ``store.clouds``.

    Args:
        keep_token: writes the admin's token where the operator finds it (0600). Called before the commit: a
            crash in between leaves a file with a dead token, which the next start overwrites, never a lost token.
    """
    now = utcnow()
    async with db.begin() as conn:
        if await conn.scalar(select(organizations.c.id).limit(1)) is not None:
            return False
        organization, project, user = new_id("org"), new_id("prj"), new_id("usr")
        first = insert(conn, organizations).values(id=organization, name=DEFAULT, created_at=now)
        # Two processes at once: the second one waits here for the first one's commit, and then has nothing to do.
        if (await conn.execute(first.on_conflict_do_nothing().returning(organizations.c.id))).first() is None:
            return False
        await conn.execute(
            projects.insert().values(id=project, organization_id=organization, name=DEFAULT, created_at=now)
        )
        await conn.execute(
            users.insert().values(id=user, organization_id=organization, name=ADMIN, role=Role.ADMIN, created_at=now)
        )
        await conn.execute(memberships.insert().values(user_id=user, project_id=project))
        token = "helio_" + secrets.token_urlsafe(32)
        await conn.execute(
            tokens.insert().values(
                id=new_id("tok"),
                user_id=user,
                name="first",
                sha256=hashlib.sha256(token.encode()).hexdigest(),
                created_at=now,
            )
        )
        keep_token(token)
    return True
