"""Who may ask: users, tokens, projects and their members."""

from __future__ import annotations

import hashlib
import secrets
from datetime import timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Row, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from api.kit.auth import Caller, Me
from api.kit.idempotency import Ordered, claim, earlier
from api.kit.pagination import Cursor, Limit, page
from heliostat import __version__
from heliostat.errors import Conflict, NotFound
from heliostat.models.common import Page, new_id, utcnow
from heliostat.models.users import Project, ProjectCreate, Role, Token, TokenCreate, User, UserCreate, WhoAmI
from store.database import insert
from store.tables import memberships, projects, tokens, users

router = APIRouter(prefix="/v1", tags=["users"])

TOKEN_PREFIX = "helio_"  # lets scanners for leaked secrets know it
RENEW_S = 600
"""A lost answer of POST /v1/tokens can be repeated so long; the token that was never used gets a new secret."""


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
async def create_project(request: Request, me: Me, order: Ordered, body: ProjectCreate) -> Project:
    me.must_be_admin("create projects")
    row: dict[str, Any] = {"id": new_id("prj"), "name": body.name, "created_at": utcnow()}
    async with request.app.state.db.begin() as conn:
        if (before := await _made_before(conn, me, order, row["id"])) is not None:
            return Project.model_validate(
                (await conn.execute(select(projects).where(projects.c.id == before))).one()._mapping
            )
        new = insert(conn, projects).values(organization_id=me.organization_id, **row)
        if (await conn.execute(new.on_conflict_do_nothing().returning(projects.c.id))).first() is None:
            raise Conflict(f"There is a project {body.name!r} already.", remedy="Choose another name.", field="name")
    request.app.state.callers.forget()
    return Project.model_validate(row)


@router.get("/projects")
async def list_projects(request: Request, me: Me, limit: Limit = 50, cursor: Cursor = None) -> Page[Project]:
    """Those that the caller may see."""
    query = select(projects).where(projects.c.id.in_(me.scope(None)))
    make = lambda r: Project.model_validate(r._mapping)  # noqa: E731
    async with request.app.state.db.read() as conn:
        return await page(conn, query, (projects.c.created_at, projects.c.id), make, limit, cursor)


@router.put("/projects/{ref}/members/{user}", status_code=204)
async def add_member(request: Request, me: Me, ref: str, user: str) -> Response:
    me.must_be_admin("change who is in a project")
    project = me.project(ref)
    async with request.app.state.db.begin() as conn:
        user_id = (await _user(conn, me, user)).id
        await conn.execute(
            insert(conn, memberships).values(user_id=user_id, project_id=project.id).on_conflict_do_nothing()
        )
    request.app.state.callers.forget()
    return Response(status_code=204)


@router.delete("/projects/{ref}/members/{user}", status_code=204)
async def remove_member(request: Request, me: Me, ref: str, user: str) -> Response:
    me.must_be_admin("change who is in a project")
    project = me.project(ref)
    m = memberships.c
    async with request.app.state.db.begin() as conn:
        user_id = (await _user(conn, me, user)).id
        await conn.execute(delete(memberships).where(m.user_id == user_id, m.project_id == project.id))
    request.app.state.callers.forget()
    return Response(status_code=204)


@router.post("/users", status_code=201)
async def create_user(request: Request, me: Me, order: Ordered, body: UserCreate) -> User:
    """A user without a token; make one with POST /v1/tokens."""
    me.must_be_admin("create users")
    into = [me.project(ref, "projects") for ref in body.projects]
    id, now = new_id("usr"), utcnow()
    async with request.app.state.db.begin() as conn:
        if (before := await _made_before(conn, me, order, id)) is not None:
            return await _whole_user(conn, await _user(conn, me, before))
        new = insert(conn, users).values(
            id=id, organization_id=me.organization_id, name=body.name, role=body.role, created_at=now
        )
        if (await conn.execute(new.on_conflict_do_nothing().returning(users.c.id))).first() is None:
            raise Conflict(f"There is a user {body.name!r} already.", remedy="Choose another name.", field="name")
        for project in into:
            await conn.execute(
                insert(conn, memberships).values(user_id=id, project_id=project.id).on_conflict_do_nothing()
            )
        return await _whole_user(conn, await _user(conn, me, id))


@router.get("/users")
async def list_users(request: Request, me: Me, limit: Limit = 50, cursor: Cursor = None) -> Page[User]:
    """An admin sees all of the organization, a member itself."""
    query = select(users).where(users.c.organization_id == me.organization_id)
    query = query if me.role is Role.ADMIN else query.where(users.c.id == me.user_id)
    async with request.app.state.db.read() as conn:
        found = await page(conn, query, (users.c.created_at, users.c.id), lambda r: r, limit, cursor)
        return Page(items=[await _whole_user(conn, r) for r in found.items], next_cursor=found.next_cursor)


@router.post("/tokens", status_code=201)
async def create_token(request: Request, me: Me, order: Ordered, body: TokenCreate) -> Token:
    """The only answer that ever holds ``secret``. A repeat under the same Idempotency-Key gives a new secret, and the
    first one dies, as long as it was never used and is some minutes old; afterwards a repeat has none."""
    secret, id, now = TOKEN_PREFIX + secrets.token_urlsafe(32), new_id("tok"), utcnow()
    sha256 = hashlib.sha256(secret.encode()).hexdigest()
    async with request.app.state.db.begin() as conn:
        user = await _user(conn, me, body.user) if body.user is not None else await _user(conn, me, me.user_id)
        if user.id != me.user_id:
            me.must_be_admin("make tokens for others")
        if (before := await _made_before(conn, me, order, id)) is not None:
            renewed = await conn.execute(
                update(tokens)
                .where(tokens.c.id == before, tokens.c.last_used_at.is_(None), tokens.c.revoked_at.is_(None))
                .where(tokens.c.created_at > now - timedelta(seconds=RENEW_S))
                .values(sha256=sha256)
            )
            found = (await conn.execute(_tokens(me).where(tokens.c.id == before))).one()
            request.app.state.callers.forget()
            return _token(found, secret if renewed.rowcount else None)
        await conn.execute(
            tokens.insert().values(
                id=id,
                user_id=user.id,
                name=body.name,
                sha256=sha256,
                created_at=now,
                expires_at=now + timedelta(days=body.expires_in_days) if body.expires_in_days else None,
            )
        )
        return _token((await conn.execute(_tokens(me).where(tokens.c.id == id))).one(), secret)


@router.get("/tokens")
async def list_tokens(
    request: Request, me: Me, user: str | None = None, limit: Limit = 50, cursor: Cursor = None
) -> Page[Token]:
    """The caller's own; an admin sees those of all. Never a secret."""
    query = _tokens(me)
    query = query.where(users.c.name == user) if user is not None else query
    async with request.app.state.db.read() as conn:
        return await page(conn, query, (tokens.c.created_at, tokens.c.id), _token, limit, cursor)


@router.delete("/tokens/{id}", status_code=204)
async def revoke_token(request: Request, me: Me, id: str) -> Response:
    """It is refused from now on (by other API processes within two seconds). Revoked already is fine."""
    async with request.app.state.db.begin() as conn:
        if (await conn.execute(_tokens(me).where(tokens.c.id == id))).first() is None:
            raise NotFound(f"There is no token {id!r} of yours.", remedy="GET /v1/tokens lists them.", resource=id)
        await conn.execute(
            update(tokens).where(tokens.c.id == id, tokens.c.revoked_at.is_(None)).values(revoked_at=utcnow())
        )
    request.app.state.callers.forget()
    return Response(status_code=204)


def _tokens(me: Caller) -> Any:
    query = select(tokens, users.c.name.label("user")).join(users, users.c.id == tokens.c.user_id)
    if me.role is Role.ADMIN:
        return query.where(users.c.organization_id == me.organization_id)
    return query.where(users.c.id == me.user_id)


def _token(row: Row[Any], secret: str | None = None) -> Token:
    return Token.model_validate({**row._mapping, "secret": secret})


async def _user(conn: AsyncConnection, me: Caller, ref: str) -> Row[Any]:
    mine = users.c.organization_id == me.organization_id
    row = (await conn.execute(select(users).where(mine, (users.c.id == ref) | (users.c.name == ref)))).first()
    if row is None or (me.role is not Role.ADMIN and row.id != me.user_id):
        raise NotFound(f"There is no user {ref!r}.", remedy="GET /v1/users lists them.", resource=ref, field="user")
    return row


async def _whole_user(conn: AsyncConnection, row: Row[Any]) -> User:
    query = select(projects.c.name).join(memberships, memberships.c.project_id == projects.c.id)
    names = await conn.scalars(query.where(memberships.c.user_id == row.id).order_by(projects.c.name))
    return User(id=row.id, name=row.name, role=Role(row.role), projects=list(names), created_at=row.created_at)


async def _made_before(conn: AsyncConnection, me: Caller, order: Any, id: str) -> str | None:
    """Inside one write transaction, so nobody can come between the question and the claim."""
    before = await earlier(conn, me.organization_id, order)
    if before is None and not await claim(conn, me.organization_id, order, id):
        return await earlier(conn, me.organization_id, order)
    return before
