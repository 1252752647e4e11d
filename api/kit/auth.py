"""Who is calling, and what they may touch. Nodes have tokens of their own, see ``api/agents/routes.py``."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated

import structlog
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import and_, or_, select, update

from heliostat.errors import InvalidRequest, NotFound, PermissionDenied, Unauthenticated, Unavailable
from heliostat.models.common import utcnow
from heliostat.models.users import Role
from store.database import Database
from store.tables import memberships, organizations, projects, tokens, users

log = structlog.get_logger(__name__)

CACHE_S = 2.0
"""How long a token's owner is remembered. What this process changes (a revoked token, a new member) counts at once;
what another API changed, after so long."""

USED_EVERY = timedelta(minutes=1)
"""``last_used_at`` is written so often at most: a write per request would be the dearest part of most of them."""

DEFAULT_PROJECT = "default"

_bearer = HTTPBearer(auto_error=False, description="A user's token, see POST /v1/tokens.")


@dataclass(frozen=True)
class Project:
    id: str
    name: str


@dataclass(frozen=True)
class Caller:
    user_id: str
    name: str
    role: Role
    organization_id: str
    organization: str
    projects: tuple[Project, ...]
    """Those that it may see and change; an admin's are all of the organization."""
    expires_at: datetime | None

    @property
    def actor(self) -> str:
        return f"user:{self.name}"

    def project(self, ref: str | None, field: str = "project") -> Project:
        """The named project, or the one that is meant when none is named. NotFound also for others' projects."""
        if ref is not None:
            for project in self.projects:
                if ref in (project.id, project.name):
                    return project
            raise NotFound(
                f"There is no project {ref!r}, or it is not yours.",
                remedy="GET /v1/projects lists yours; an admin adds you to others.",
                resource=ref,
                field=field,
            )
        for project in self.projects:
            if project.name == DEFAULT_PROJECT:
                return project
        if len(self.projects) == 1:
            return self.projects[0]
        if not self.projects:
            raise PermissionDenied(f"User {self.name} is in no project.", remedy="Ask an admin to add you to one.")
        raise InvalidRequest("Which project is meant?", remedy="Name one of yours in 'project'.", field=field)

    def scope(self, ref: str | None) -> list[str]:
        """Ids of the projects that a list or a look-up covers."""
        return [p.id for p in self.projects] if ref is None else [self.project(ref).id]

    def must_be_admin(self, to: str) -> None:
        if self.role is not Role.ADMIN:
            raise PermissionDenied(f"Only an admin may {to}.", remedy="Ask an admin of your organization.")


@dataclass
class Callers:
    """Tokens lately seen by this process."""

    db: Database
    _seen: dict[str, tuple[float, Caller]] = field(default_factory=dict)

    def forget(self) -> None:
        """Call after any change of tokens, users, projects or memberships."""
        self._seen.clear()

    async def identify(self, token: str) -> Caller:
        sha256 = hashlib.sha256(token.encode()).hexdigest()
        at, caller = self._seen.get(sha256, (0.0, None))
        if caller is None or time.monotonic() - at > CACHE_S:
            began = time.monotonic()
            caller = await self._look_up(sha256)
            if len(self._seen) > 10_000:
                self._seen.clear()
            self._seen[sha256] = (began, caller)
        if caller.expires_at is not None and caller.expires_at <= utcnow():
            raise _refused("has expired")
        return caller

    async def _look_up(self, sha256: str) -> Caller:
        async with self.db.read() as conn:
            row = (
                await conn.execute(
                    select(
                        tokens.c.id, tokens.c.expires_at, tokens.c.revoked_at, tokens.c.last_used_at,
                        users.c.id.label("user_id"), users.c.name, users.c.role,
                        organizations.c.id.label("organization_id"), organizations.c.name.label("organization"),
                    )
                    .join(users, users.c.id == tokens.c.user_id)
                    .join(organizations, organizations.c.id == users.c.organization_id)
                    .where(tokens.c.sha256 == sha256)
                )
            ).first()  # fmt: skip
            if row is None:
                self._seen.pop(sha256, None)
                raise _refused("is unknown")
            if row.revoked_at is not None:
                self._seen.pop(sha256, None)
                raise _refused("was revoked")
            member = and_(memberships.c.project_id == projects.c.id, memberships.c.user_id == row.user_id)
            found = await conn.execute(
                select(projects.c.id, projects.c.name)
                .outerjoin(memberships, member)
                .where(projects.c.organization_id == row.organization_id)
                .where(or_(memberships.c.user_id.is_not(None), row.role == Role.ADMIN))
                .order_by(projects.c.name)
            )
            mine = tuple(Project(r.id, r.name) for r in found)
        if row.last_used_at is None or utcnow() - row.last_used_at > USED_EVERY:
            await self._note_use(row.id)
        return Caller(
            user_id=row.user_id,
            name=row.name,
            role=Role(row.role),
            organization_id=row.organization_id,
            organization=row.organization,
            projects=mine,
            expires_at=row.expires_at,
        )

    async def _note_use(self, token_id: str) -> None:
        try:
            async with self.db.begin() as conn:
                await conn.execute(update(tokens).where(tokens.c.id == token_id).values(last_used_at=utcnow()))
        except Unavailable as e:  # a request that only reads must not fail because of this
            log.warning("last use of a token not noted", token=token_id, why=str(e))


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(
        f"The token {why}.", remedy="Run `heliostat login`, or set HELIOSTAT_TOKEN to a valid token."
    )


async def _caller(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    if credentials is None:
        raise Unauthenticated(
            "There is no bearer token in this request.", remedy="Send 'Authorization: Bearer <token>'."
        )
    callers: Callers = request.app.state.callers
    return await callers.identify(credentials.credentials)


Me = Annotated[Caller, Depends(_caller)]
"""The caller of a route; 401 without a valid token."""
