"""The records on both databases: every test of this folder that asks for ``db`` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from heliostat.models.common import utcnow
from store.database import Database, migrate
from store.tables import clouds, organizations, projects


@contextmanager
def fresh_database(server: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of its own on a PostgreSQL server."""
    name = f"t{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
    base, _, query = server.partition("?")
    url = base.replace("postgresql://", "postgresql+psycopg://").rpartition("/")[0] + f"/{name}"
    yield f"{url}?{query}" if query else url
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
        return
    with fresh_database(request.getfixturevalue("postgres")) as url:
        yield url


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """Migrated records."""
    await migrate(database_url)
    database = Database(database_url)
    yield database
    await database.dispose()


@pytest.fixture
async def project(db: Database) -> str:
    """A project and a cloud to hang things on; returns the project's id, ``cloud_1`` is the cloud's."""
    now = utcnow()
    async with db.begin() as conn:
        await conn.execute(organizations.insert().values(id="org_1", name="default", created_at=now))
        await conn.execute(
            projects.insert().values(id="prj_1", organization_id="org_1", name="default", created_at=now)
        )
        await conn.execute(
            clouds.insert().values(
                id="cloud_1", organization_id="org_1", name="local", provider="local", capabilities={}, created_at=now
            )
        )
    return "prj_1"
