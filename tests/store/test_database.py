from __future__ import annotations

import asyncio
import os
import sqlite3
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
    with pytest.raises(Unavailable, match="are unreachable"):
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


async def test_waiting_for_another_processs_write_leaves_the_loop_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
    await migrate(url)
    db = Database(url)
    other = sqlite3.connect(tmp_path / "records.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def write(id: str) -> None:
        async with db.begin() as conn:
            await conn.execute(organizations.insert().values(id=id, name=id, created_at=utcnow()))

    waiting = asyncio.create_task(write("org_1"))
    for _ in range(50):  # turns of the loop, while the other process holds on
        await asyncio.sleep(0.001)
        async with db.read() as conn:
            assert (await conn.execute(select(organizations.c.id))).all() == []
    assert not waiting.done()
    other.execute("COMMIT")
    await waiting
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("store.database.BUSY_TIMEOUT_MS", 50)
    hasty = Database(url)
    with pytest.raises(Unavailable, match="locked"):
        async with hasty.begin():
            pass
    other.execute("ROLLBACK")
    other.close()
    await write("org_2")
    async with db.read() as conn:
        assert (await conn.scalars(select(organizations.c.id).order_by(organizations.c.id))).all() == ["org_1", "org_2"]
    await hasty.dispose()
    await db.dispose()


async def test_a_write_that_is_cancelled_leaves_the_writer_whole(db: Database) -> None:
    async def write(n: int) -> None:
        async with db.begin() as conn:
            await conn.execute(organizations.insert().values(id=f"org_{n}", name=str(n), created_at=utcnow()))
            await asyncio.sleep(0.002 * (n % 4))

    tasks = [asyncio.create_task(write(n)) for n in range(12)]
    for n, task in enumerate(tasks):
        await asyncio.sleep(0.002)
        if n % 2:
            task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results), results
    async with db.read() as conn:
        there = set(await conn.scalars(select(organizations.c.id)))
    assert there >= {f"org_{n}" for n, r in enumerate(results) if r is None}
    await write(99)
