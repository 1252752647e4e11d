"""Who may call: users, tokens, projects and their members."""

from __future__ import annotations

import hashlib
import secrets
from datetime import timedelta

from fastapi import APIRouter, Response

from api.kit.auth import Me
from api.kit.callers import Caller
from api.kit.context import Ctx
from api.kit.idempotency import IdempotencyKey, Key, find_previous, reserve
from api.kit.listing import Cursor, Limit, list_page
from heliostat import __version__
from heliostat.errors import Conflict, NotFound
from heliostat.models.common import Page, new_id, utcnow
from heliostat.models.users import Project, ProjectCreate, Role, Token, TokenCreate, User, UserCreate, WhoAmI
from store import people
from store.database import AsyncConnection
from store.pages import Found, PageRequest
from store.people import TokenScope, UserRow

router = APIRouter(prefix="/v1", tags=["users"])

TOKEN_PREFIX = "helio_"  # scanners for leaked secrets recognize it
RENEW_S = 600
"""How long POST /v1/tokens can be repeated after a lost answer; a token that was never used gets a new secret."""


@router.get("/whoami")
async def whoami(me: Me) -> WhoAmI:
    return WhoAmI(
        user=me.name,
        role=me.role,
        organization=me.organization,
        projects=[p.name for p in me.projects],
        server_version=__version__,
    )


@router.post("/projects", status_code=201)
async def create_project(ctx: Ctx, me: Me, key: Key, body: ProjectCreate) -> Project:
    me.must_be_admin("create projects")
    made = Project(id=new_id("prj"), name=body.name, created_at=utcnow())
    async with ctx.db.begin() as conn:
        if (previous := await _previous(conn, me, key, made.id)) is not None:
            return await people.load_project(conn, previous)
        if not await people.insert_project(conn, me.organization_id, made):
            raise Conflict(f"Project {body.name!r} exists already.", remedy="Choose another name.", field="name")
    ctx.callers.forget()
    return made


@router.get("/projects")
async def list_projects(ctx: Ctx, me: Me, limit: Limit = 50, cursor: Cursor = None) -> Page[Project]:
    """Those that the caller may see."""

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[Project]:
        return await people.list_projects(conn, me.scope(None), page)

    return await list_page(ctx, find, limit, cursor)


@router.put("/projects/{ref}/members/{user}", status_code=204)
async def add_member(ctx: Ctx, me: Me, ref: str, user: str) -> Response:
    me.must_be_admin("change who is in a project")
    project = me.project(ref)
    async with ctx.db.begin() as conn:
        await people.add_member(conn, (await _user(conn, me, user)).id, project.id)
    ctx.callers.forget()
    return Response(status_code=204)


@router.delete("/projects/{ref}/members/{user}", status_code=204)
async def remove_member(ctx: Ctx, me: Me, ref: str, user: str) -> Response:
    me.must_be_admin("change who is in a project")
    project = me.project(ref)
    async with ctx.db.begin() as conn:
        await people.remove_member(conn, (await _user(conn, me, user)).id, project.id)
    ctx.callers.forget()
    return Response(status_code=204)


@router.post("/users", status_code=201)
async def create_user(ctx: Ctx, me: Me, key: Key, body: UserCreate) -> User:
    """A user without a token; create one with POST /v1/tokens."""
    me.must_be_admin("create users")
    projects = [me.project(ref, "projects") for ref in body.projects]
    id, now = new_id("usr"), utcnow()
    async with ctx.db.begin() as conn:
        if (previous := await _previous(conn, me, key, id)) is not None:
            return await people.with_projects(conn, await _user(conn, me, previous))
        if not await people.insert_user(conn, id, me.organization_id, body.name, body.role, now):
            raise Conflict(f"User {body.name!r} exists already.", remedy="Choose another name.", field="name")
        for project in projects:
            await people.add_member(conn, id, project.id)
        return await people.with_projects(conn, UserRow(id, body.name, body.role, now))


@router.get("/users")
async def list_users(ctx: Ctx, me: Me, limit: Limit = 50, cursor: Cursor = None) -> Page[User]:
    """An admin sees all users of the organization, a member itself."""
    only_id = None if me.role is Role.ADMIN else me.user_id

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[User]:
        found = await people.list_users(conn, me.organization_id, only_id, page)
        return Found([await people.with_projects(conn, row) for row in found.items], found.last)

    return await list_page(ctx, find, limit, cursor)


@router.post("/tokens", status_code=201)
async def create_token(ctx: Ctx, me: Me, key: Key, body: TokenCreate) -> Token:
    """The only answer that ever holds ``secret``. A repeat with the same Idempotency-Key returns a new secret, which
    replaces the first one, while that is unused and at most some minutes old; afterwards a repeat returns none."""
    secret, id, now = TOKEN_PREFIX + secrets.token_urlsafe(32), new_id("tok"), utcnow()
    sha256 = hashlib.sha256(secret.encode()).hexdigest()
    async with ctx.db.begin() as conn:
        user = await _user(conn, me, body.user if body.user is not None else me.user_id)
        if user.id != me.user_id:
            me.must_be_admin("create tokens for others")
        if (previous := await _previous(conn, me, key, id)) is not None:
            renewed = await people.renew_token(conn, previous, sha256, now - timedelta(seconds=RENEW_S))
            found = await _token(conn, me, previous)
            ctx.callers.forget()
            return found.model_copy(update={"secret": secret if renewed else None})
        expires_at = now + timedelta(days=body.expires_in_days) if body.expires_in_days else None
        await people.insert_token(conn, id, user.id, body.name, sha256, now, expires_at)
    return Token(id=id, name=body.name, user=user.name, created_at=now, expires_at=expires_at, secret=secret)


@router.get("/tokens")
async def list_tokens(
    ctx: Ctx, me: Me, user: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Token]:
    """The caller's own; an admin sees those of all. Never a secret."""

    async def find(conn: AsyncConnection, page: PageRequest) -> Found[Token]:
        return await people.list_tokens(conn, _token_scope(me), user, page)

    return await list_page(ctx, find, limit, cursor)


@router.delete("/tokens/{id}", status_code=204)
async def revoke_token(ctx: Ctx, me: Me, id: str) -> Response:
    """It is refused from now on (by other API processes within two seconds). A revoked token is fine."""
    async with ctx.db.begin() as conn:
        await _token(conn, me, id)
        await people.revoke_token(conn, id)
    ctx.callers.forget()
    return Response(status_code=204)


async def _token(conn: AsyncConnection, me: Caller, id: str) -> Token:
    found = await people.find_token(conn, _token_scope(me), id)
    if found is None:
        raise NotFound(f"You have no token {id!r}.", remedy="GET /v1/tokens lists yours.", resource=id)
    return found


def _token_scope(me: Caller) -> TokenScope:
    return TokenScope(me.organization_id, None if me.role is Role.ADMIN else me.user_id)


async def _user(conn: AsyncConnection, me: Caller, ref: str) -> UserRow:
    row = await people.find_user(conn, me.organization_id, ref)
    if row is None or (me.role is not Role.ADMIN and row.id != me.user_id):
        raise NotFound(f"There is no user {ref!r}.", remedy="GET /v1/users lists them.", resource=ref, field="user")
    return row


async def _previous(conn: AsyncConnection, me: Caller, key: IdempotencyKey, id: str) -> str | None:
    """What a previous request with this key has created; None: the key is reserved for ``id`` now."""
    previous = await find_previous(conn, me.organization_id, key)
    return previous if previous is not None else await reserve(conn, me.organization_id, key, id)
