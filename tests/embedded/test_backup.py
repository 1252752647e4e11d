"""Backup and restore of files, without a stack. With one: test_stack.py."""

from __future__ import annotations

import io
import sqlite3
import stat
import tarfile
import threading
from contextlib import closing
from pathlib import Path

import pytest
from alembic.util.exc import CommandError

from embedded.backup import backup, restore
from heliostat.errors import Conflict, InvalidRequest, NotFound
from runtime.home import Home
from runtime.settings import Settings
from store.database import Database, migrate
from store.migrate import run as migrate_as_command


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    for name in ("records.db", "temporal.db"):
        with closing(sqlite3.connect(made.path / name)) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE t (n INTEGER)")
            database.execute("INSERT INTO t VALUES (1)")
            database.commit()
    made.secret_key.write_text("secret")
    made.write_state({"ports": {"api": 61000}})
    return made


def numbers(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as database:
        return [n for (n,) in database.execute("SELECT n FROM t ORDER BY n")]


def test_there_and_back(home: Home) -> None:
    with closing(sqlite3.connect(home.temporal_db)) as in_use:  # still in the write-ahead log, and the file is open
        in_use.execute("INSERT INTO t VALUES (2)")
        in_use.commit()
        archive = backup(home)
        assert stat.S_IMODE(archive.stat().st_mode) == 0o600
        in_use.execute("INSERT INTO t VALUES (3)")
        in_use.commit()
    home.secret_key.write_text("another")
    aside = restore(home, archive)
    assert numbers(home.temporal_db) == [1, 2]
    assert numbers(home.records_db) == [1]
    assert home.secret_key.read_text() == "secret"
    assert home.state() == {"ports": {"api": 61000}}
    assert aside is not None
    assert numbers(aside / "temporal.db") == [1, 2, 3], "nothing is deleted"
    assert (aside / "secret.key").read_text() == "another"


def test_into_an_empty_home(home: Home, tmp_path: Path) -> None:
    new = Home(tmp_path / "new")
    assert restore(new, backup(home, tmp_path / "b.tar.gz")) is None
    assert numbers(new.records_db) == [1]


def test_no_write_reaches_the_records_while_temporal_is_copied(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the copied Temporal has done the copied records know, so a copy of records that is *newer* than
    Temporal's by an accepted job would be harmless, and one that is older must not happen."""
    import embedded.backup as module

    copy, tried = module.copy_database, []

    def copy_and_write(source: Path, target: Path) -> None:
        def write() -> None:
            with (
                closing(sqlite3.connect(home.records_db, timeout=0.1)) as other,
                pytest.raises(sqlite3.OperationalError),
            ):
                other.execute("INSERT INTO t VALUES (99)")
            tried.append(source.name)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        copy(source, target)

    monkeypatch.setattr(module, "copy_database", copy_and_write)
    backup(home)
    assert tried == ["temporal.db", "records.db"]
    with closing(sqlite3.connect(home.records_db, timeout=0.1)) as other:
        other.execute("INSERT INTO t VALUES (2)")  # and now they go through


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has no records"):
        backup(Home(tmp_path))


def test_not_over_a_running_stack(home: Home) -> None:
    archive = backup(home)
    lock = home.try_lock()
    assert lock is not None
    with lock, pytest.raises(Conflict, match="runs"):
        restore(home, archive)


@pytest.mark.parametrize("name", ["../escape", "records.db/../../escape", "other.txt"])
def test_a_foreign_archive_changes_nothing(home: Home, tmp_path: Path, name: str) -> None:
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for entry in ("records.db", name):
            info = tarfile.TarInfo(entry)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(InvalidRequest, match="not a backup"):
        restore(home, archive)
    assert numbers(home.records_db) == [1]
    assert not (tmp_path / "escape").exists()


def test_a_damaged_archive_changes_nothing(home: Home) -> None:
    archive = backup(home)
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        restore(home, archive)
    assert numbers(home.records_db) == [1]


async def test_records_are_copied_before_a_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    await migrate(settings.records_url)
    assert "a copy" not in await migrate_as_command(settings), "nothing to do, nothing to copy"
    with closing(sqlite3.connect(tmp_path / "records.db")) as records:
        records.execute("UPDATE alembic_version SET version_num = 'other'")
        records.commit()
    with pytest.raises(Conflict, match="other"):  # of newer code: left alone
        await migrate_as_command(settings)
    assert list((tmp_path / "backups").iterdir()) == []

    monkeypatch.setattr("store.migrate.known_revisions", lambda: {"other"})
    with pytest.raises(CommandError, match="other"):  # older, but the way up from there fails: after the copy
        await migrate_as_command(settings)
    (saved,) = (tmp_path / "backups").glob("records-at-other-*.db")
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    db = Database(f"sqlite+aiosqlite:///{saved}")
    assert await db.schema_revision() == "other"
    await db.dispose()
