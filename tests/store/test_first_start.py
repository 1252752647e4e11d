from __future__ import annotations

import asyncio
import hashlib
import shutil
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import select

from heliostat.errors import Conflict
from heliostat.models.clouds import Capabilities, Provider
from runtime.settings import Settings
from store import migrate as command
from store.bootstrap import ensure_first
from store.clouds import register_cloud
from store.database import Database, latest_revision
from store.tables import clouds, organizations, projects, tokens, users


async def test_processes_that_start_at_once_make_one_organization_and_one_token(db: Database) -> None:
    kept: list[str] = []
    made = await asyncio.gather(*(ensure_first(db, kept.append) for _ in range(5)))
    assert sorted(made) == [False] * 4 + [True]
    assert len(kept) == 1
    async with db.read() as conn:
        for table in (organizations, projects, users):
            assert len((await conn.execute(select(table))).all()) == 1
        stored = (await conn.execute(select(tokens))).one()
    assert stored.sha256 == hashlib.sha256(kept[0].encode()).hexdigest()
    ids = await asyncio.gather(*(register_cloud(db, "local", Provider.LOCAL, Capabilities()) for _ in range(3)))
    assert len(set(ids)) == 1
    async with db.read() as conn:
        assert (await conn.execute(select(clouds.c.is_default))).scalars().all() == [True]


async def test_a_crash_before_the_token_is_kept_makes_nothing(db: Database) -> None:
    def crash(token: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        await ensure_first(db, crash)
    kept: list[str] = []
    assert await ensure_first(db, kept.append)
    assert len(kept) == 1


async def test_records_that_change_are_saved_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    for _ in range(2):  # they are new; nothing to do
        assert "copy" not in await command.run(settings)
    # This code's migrations and one more, as the next release has them.
    folder = tmp_path / "migrations"
    shutil.copytree(Path(command.__file__).parent / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = "from alembic import op\nrevision, down_revision = 'next', 'LATEST'\n"
    text += "def upgrade():\n    op.execute('CREATE TABLE more (id INT)')\n"
    (folder / "versions" / "9999_next.py").write_text(text.replace("LATEST", latest_revision()))
    with monkeypatch.context() as newer:
        newer.setattr("store.database._MIGRATIONS", folder)
        assert "a copy of what they were is" in await command.run(settings)
    (saved,) = (tmp_path / "backups").iterdir()
    assert _tables(tmp_path / "records.db") - _tables(saved) == {"more"}
    with pytest.raises(Conflict, match="schema next"):
        await command.run(settings)  # the old code on the new records


def _tables(path: Path) -> set[str]:
    with sqlite3.connect(path) as conn:
        found = {name for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    conn.close()
    return found
