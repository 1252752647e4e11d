from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select, text

from heliostat.errors import Unavailable
from heliostat.models.common import utcnow
from store.database import Database, latest_revision, migrate
from store.tables import metadata, organizations


async def test_migrations_make_exactly_the_tables(db: Database) -> None:
    async with db.read() as conn:
        difference = await conn.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync, opts={"compare_type": True}), metadata)
        )
    assert difference == []
    assert await db.schema_revision() == latest_revision()


async def test_two_processes_may_migrate_at_once(database_url: str) -> None:
    await asyncio.gather(*(migrate(database_url) for _ in range(4)))
    db = Database(database_url)
    assert await db.schema_revision() == latest_revision()
    await db.dispose()


async def test_unmigrated_records_say_so(database_url: str) -> None:
    db = Database(database_url)
    assert await db.schema_revision() is None
    await db.dispose()


async def test_a_failed_transaction_leaves_nothing(db: Database) -> None:
    with pytest.raises(RuntimeError):  # noqa: PT012
        async with db.begin() as conn:
            await conn.execute(organizations.insert().values(id="org_1", name="a", created_at=utcnow()))
            raise RuntimeError
    async with db.read() as conn:
        assert (await conn.execute(select(organizations))).all() == []


async def test_many_writers_and_readers_at_once(db: Database) -> None:
    async def write(n: int) -> None:
        async with db.begin() as conn:
            await conn.execute(select(organizations))
            await conn.execute(organizations.insert().values(id=f"org_{n}", name=str(n), created_at=utcnow()))

    async def read() -> None:
        async with db.read() as conn:
            await conn.execute(select(organizations))

    await asyncio.gather(*(write(n) for n in range(40)), *(read() for _ in range(40)))
    async with db.read() as conn:
        assert len((await conn.execute(select(organizations))).all()) == 40


async def test_an_absent_server_is_unavailable_and_the_password_stays_secret() -> None:
    db = Database("postgresql+psycopg://me:hunter2@127.0.0.1:1/none")
    with pytest.raises(Unavailable) as e:
        await db.connect()
    assert "hunter2" not in str(e.value)
    assert "HELIOSTAT_DATABASE_URL" in e.value.remedy


async def test_an_absent_folder_is_unavailable(tmp_path: Path) -> None:
    db = Database(f"sqlite+aiosqlite:///{tmp_path / 'none' / 'records.db'}")
    with pytest.raises(Unavailable, match="out of reach"):
        await db.connect()
    await db.dispose()


async def test_a_commit_survives_kill_9(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
    await migrate(url)
    program = f"""
import asyncio, os, signal
from heliostat.models.common import utcnow
from store.database import Database
from store.tables import organizations
async def main():
    db = Database({url!r})
    async with db.begin() as conn:
        await conn.execute(organizations.insert().values(id="org_1", name="a", created_at=utcnow()))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == -9
    db = Database(url)
    async with db.read() as conn:
        assert (await conn.execute(text("SELECT name FROM organizations"))).scalar_one() == "a"
        assert (await conn.execute(text("PRAGMA journal_mode"))).scalar_one() == "wal"
    await db.dispose()
