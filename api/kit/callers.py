"""Who calls, by the token of the request, and which projects they may see and change."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog

from heliostat.errors import InvalidRequest, NotFound, PermissionDenied, Unauthenticated, Unavailable
from heliostat.models.common import utcnow
from heliostat.models.users import Role
from store.database import Database
from store.people import note_token_use, projects_of, token_owner

log = structlog.get_logger(__name__)

CACHE_S = 2.0
"""How long a token's owner is cached. Changes through this process (a revoked token, a new member) count at once,
those through another API process after this time."""

USED_EVERY = timedelta(minutes=1)
"""How often ``last_used_at`` is written at most: a write per request would cost more than most requests themselves."""

DEFAULT_PROJECT = "default"


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
    """Those that the caller may see and change; an admin's are all of the organization."""
    expires_at: datetime | None

    @property
    def actor(self) -> str:
        return f"user:{self.name}"

    def project(self, ref: str | None, field: str = "project") -> Project:
        """The named project, else the default one, else the only one. NotFound also for others' projects."""
        if ref is not None:
            for project in self.projects:
                if ref in (project.id, project.name):
                    return project
            raise NotFound(
                f"There is no project {ref!r}, or you are not a member of it.",
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
        raise InvalidRequest("The request names no project.", remedy="Name one of yours in 'project'.", field=field)

    def scope(self, ref: str | None) -> list[str]:
        """Ids of the projects that a list or a lookup covers."""
        return [p.id for p in self.projects] if ref is None else [self.project(ref).id]

    def must_be_admin(self, to: str) -> None:
        if self.role is not Role.ADMIN:
            raise PermissionDenied(f"Only an admin may {to}.", remedy="Ask an admin of your organization.")


@dataclass
class Callers:
    """Cache of the tokens that this process has seen lately."""

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
            caller = await self._find(sha256)
            if len(self._seen) > 10_000:
                self._seen.clear()
            self._seen[sha256] = (began, caller)
        if caller.expires_at is not None and caller.expires_at <= utcnow():
            raise _refused("has expired")
        return caller

    async def _find(self, sha256: str) -> Caller:
        async with self.db.read() as conn:
            owner = await token_owner(conn, sha256)
            if owner is None:
                self._seen.pop(sha256, None)
                raise _refused("is unknown")
            if owner.revoked_at is not None:
                self._seen.pop(sha256, None)
                raise _refused("was revoked")
            projects = await projects_of(conn, owner.organization_id, owner.user_id, owner.role)
        if owner.last_used_at is None or utcnow() - owner.last_used_at > USED_EVERY:
            await self._note_use(owner.token_id)
        return Caller(
            user_id=owner.user_id,
            name=owner.name,
            role=owner.role,
            organization_id=owner.organization_id,
            organization=owner.organization,
            projects=tuple(Project(id, name) for id, name in projects),
            expires_at=owner.expires_at,
        )

    async def _note_use(self, token_id: str) -> None:
        try:
            async with self.db.begin() as conn:
                await note_token_use(conn, token_id)
        except Unavailable as e:  # a request that only reads must not fail because of this
            log.warning("last use of a token is not recorded", token=token_id, why=str(e))


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(
        f"The token {why}.", remedy="Run `heliostat login`, or set HELIOSTAT_TOKEN to a valid token."
    )
