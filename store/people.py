"""Users, their tokens, projects and who is a member of which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, and_, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import utcnow
from heliostat.models.users import Project, Role, Token, User
from store.database import insert
from store.pages import Found, PageRequest, read_page
from store.tables import memberships, organizations, projects, tokens, users


@dataclass(frozen=True)
class TokenOwner:
    """A token and the user that it belongs to."""

    token_id: str
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    user_id: str
    name: str
    role: Role
    organization_id: str
    organization: str


@dataclass(frozen=True)
class UserRow:
    id: str
    name: str
    role: Role
    created_at: datetime


@dataclass(frozen=True)
class TokenScope:
    """Whose tokens are visible: one user's, or all of the organization."""

    organization_id: str
    user_id: str | None


# --- tokens -------------------------------------------------------------------------------------------------


async def token_owner(conn: AsyncConnection, sha256: str) -> TokenOwner | None:
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
        return None
    return TokenOwner(
        token_id=row.id,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        user_id=row.user_id,
        name=row.name,
        role=Role(row.role),
        organization_id=row.organization_id,
        organization=row.organization,
    )


async def note_token_use(conn: AsyncConnection, token_id: str) -> None:
    await conn.execute(update(tokens).where(tokens.c.id == token_id).values(last_used_at=utcnow()))


async def insert_token(
    conn: AsyncConnection,
    id: str,
    user_id: str,
    name: str,
    sha256: str,
    created_at: datetime,
    expires_at: datetime | None,
) -> None:
    await conn.execute(
        tokens.insert().values(
            id=id, user_id=user_id, name=name, sha256=sha256, created_at=created_at, expires_at=expires_at
        )
    )


async def renew_token(conn: AsyncConnection, id: str, sha256: str, created_after: datetime) -> bool:
    """Gives a token that was never used another secret. False: it was used, was revoked, or is older."""
    renewed = await conn.execute(
        update(tokens)
        .where(tokens.c.id == id, tokens.c.last_used_at.is_(None), tokens.c.revoked_at.is_(None))
        .where(tokens.c.created_at > created_after)
        .values(sha256=sha256)
    )
    return bool(renewed.rowcount)


async def revoke_token(conn: AsyncConnection, id: str) -> None:
    """Repeatable: the first time counts."""
    await conn.execute(
        update(tokens).where(tokens.c.id == id, tokens.c.revoked_at.is_(None)).values(revoked_at=utcnow())
    )


async def find_token(conn: AsyncConnection, scope: TokenScope, id: str) -> Token | None:
    row = (await conn.execute(_tokens(scope).where(tokens.c.id == id))).first()
    return _token(row) if row is not None else None


async def list_tokens(conn: AsyncConnection, scope: TokenScope, user: str | None, page: PageRequest) -> Found[Token]:
    """Newest first. ``user``: of this name only."""
    query = _tokens(scope)
    query = query.where(users.c.name == user) if user is not None else query
    return await read_page(conn, query, (tokens.c.created_at, tokens.c.id), _token, page)


def _tokens(scope: TokenScope) -> Select[Any]:
    query = select(tokens, users.c.name.label("user")).join(users, users.c.id == tokens.c.user_id)
    if scope.user_id is None:
        return query.where(users.c.organization_id == scope.organization_id)
    return query.where(users.c.id == scope.user_id)


def _token(row: Row[Any]) -> Token:
    return Token.model_validate(row._mapping)


# --- users --------------------------------------------------------------------------------------------------


async def insert_user(
    conn: AsyncConnection, id: str, organization_id: str, name: str, role: Role, created_at: datetime
) -> bool:
    """False: the name is taken."""
    new = insert(conn, users).values(
        id=id, organization_id=organization_id, name=name, role=role, created_at=created_at
    )
    return (await conn.execute(new.on_conflict_do_nothing().returning(users.c.id))).first() is not None


async def find_user(conn: AsyncConnection, organization_id: str, ref: str) -> UserRow | None:
    """By id or name."""
    mine = users.c.organization_id == organization_id
    row = (await conn.execute(select(users).where(mine, (users.c.id == ref) | (users.c.name == ref)))).first()
    return _user_row(row) if row is not None else None


async def list_users(
    conn: AsyncConnection, organization_id: str, only_id: str | None, page: PageRequest
) -> Found[UserRow]:
    """Newest first. ``only_id``: this user alone."""
    query = select(users).where(users.c.organization_id == organization_id)
    query = query if only_id is None else query.where(users.c.id == only_id)
    return await read_page(conn, query, (users.c.created_at, users.c.id), _user_row, page)


async def with_projects(conn: AsyncConnection, user: UserRow) -> User:
    query = select(projects.c.name).join(memberships, memberships.c.project_id == projects.c.id)
    names = await conn.scalars(query.where(memberships.c.user_id == user.id).order_by(projects.c.name))
    return User(id=user.id, name=user.name, role=user.role, projects=list(names), created_at=user.created_at)


def _user_row(row: Row[Any]) -> UserRow:
    return UserRow(row.id, row.name, Role(row.role), row.created_at)


# --- projects -----------------------------------------------------------------------------------------------


async def insert_project(conn: AsyncConnection, organization_id: str, project: Project) -> bool:
    """False: the name is taken."""
    new = insert(conn, projects).values(
        id=project.id, organization_id=organization_id, name=project.name, created_at=project.created_at
    )
    return (await conn.execute(new.on_conflict_do_nothing().returning(projects.c.id))).first() is not None


async def load_project(conn: AsyncConnection, id: str) -> Project:
    return Project.model_validate((await conn.execute(select(projects).where(projects.c.id == id))).one()._mapping)


async def lock_project(conn: AsyncConnection, id: str) -> None:
    """Until the transaction ends, others that lock it wait."""
    await conn.execute(select(projects.c.id).where(projects.c.id == id).with_for_update())


async def list_projects(conn: AsyncConnection, ids: Sequence[str], page: PageRequest) -> Found[Project]:
    """Newest first."""
    query = select(projects).where(projects.c.id.in_(ids))
    by = (projects.c.created_at, projects.c.id)
    return await read_page(conn, query, by, lambda r: Project.model_validate(r._mapping), page)


async def projects_of(conn: AsyncConnection, organization_id: str, user_id: str, role: Role) -> list[tuple[str, str]]:
    """(id, name) of those that a user may see and change, by name; an admin's are all of the organization."""
    member = and_(memberships.c.project_id == projects.c.id, memberships.c.user_id == user_id)
    query = (
        select(projects.c.id, projects.c.name)
        .outerjoin(memberships, member)
        .where(projects.c.organization_id == organization_id)
        .order_by(projects.c.name)
    )
    if role is not Role.ADMIN:
        query = query.where(memberships.c.user_id.is_not(None))
    return [(r.id, r.name) for r in await conn.execute(query)]


async def add_member(conn: AsyncConnection, user_id: str, project_id: str) -> None:
    """Repeatable."""
    new = insert(conn, memberships).values(user_id=user_id, project_id=project_id)
    await conn.execute(new.on_conflict_do_nothing())


async def remove_member(conn: AsyncConnection, user_id: str, project_id: str) -> None:
    m = memberships.c
    await conn.execute(delete(memberships).where(m.user_id == user_id, m.project_id == project_id))
