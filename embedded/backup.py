"""Backup and restore of a home: the records, the embedded Temporal's file, the keys; running or stopped.

A backup is one ``.tar.gz`` (0600: it holds the secret key). Objects of the local bucket (code, logs) are not in
it; they are plain files in ``<home>/bucket``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from heliostat.errors import Conflict, InvalidRequest, NotFound
from runtime.home import Home
from store.sqlite import copy_database

_DATABASES = ("records.db", "temporal.db")
_FILES = ("secret.key", "oidc.key", "admin.token", "stack.json")
"""``stack.json`` for its ports: clusters that live call them."""


def backup(home: Home, to: Path | None = None) -> Path:
    """Writes the archive and returns its path (default: ``<home>/backups/<time>.tar.gz``).

    Raises:
        NotFound: there is nothing to save.
        InvalidRequest: the archive cannot be written where it should.
    """
    if not home.records_db.exists():
        raise NotFound(
            f"{home.path} has no records.",
            remedy="Set HELIOSTAT_HOME to the stack's home. Records in PostgreSQL are saved by its own tools.",
            resource=str(home.path),
        )
    if to is not None and not to.parent.is_dir():
        raise InvalidRequest(f"There is no directory {to.parent}.", remedy="Make it, or give another path.")
    home.create()
    target = to or home.backups / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.tar.gz"
    with tempfile.TemporaryDirectory(dir=home.backups, prefix=".backup-") as scratch:
        # No write reaches the records while both files are copied. So the pair fits together: whatever
        # the copied Temporal has done, the copied records know, and what the records accepted without Temporal
        # is started by the monitor.
        with _writes_held(home.records_db):
            for name in reversed(_DATABASES):
                if (home.path / name).exists():
                    copy_database(home.path / name, Path(scratch) / name)
        fd = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz", compresslevel=3) as archive:
            for name in _DATABASES:
                if (Path(scratch) / name).exists():
                    archive.add(Path(scratch) / name, name)
            for name in _FILES:
                if (home.path / name).exists():
                    archive.add(home.path / name, name)
    return target


@contextlib.contextmanager
def _writes_held(database: Path) -> Iterator[None]:
    """Writers of other processes wait for us (10 s, ``store.database.BUSY_TIMEOUT_MS``); readers do not."""
    with contextlib.closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            held.execute("ROLLBACK")


def restore(home: Home, archive: Path) -> Path | None:
    """Puts an archive's files in place of the home's. What stood there is moved aside, never deleted.

    Returns:
        The directory that now holds what stood there before; None if nothing did.

    Raises:
        Conflict: the stack runs.
        NotFound, InvalidRequest: no such archive, or not one of ours.
    """
    lock = home.try_lock()
    living = home.processes()
    if lock is None or living:
        raise Conflict(
            f"The stack of {home.path} is running and would overwrite the restore.",
            remedy="Stop it first: Ctrl-C where it runs, or `make down`.",
            resource=str(home.path),
        )
    with lock:
        if not archive.exists():
            raise NotFound(f"There is no archive {archive}.", remedy="Give the path that the backup printed.")
        with tempfile.TemporaryDirectory(dir=home.path, prefix=".restore-") as scratch:
            fresh = _unpack(archive, Path(scratch))
            aside = home.backups / f"replaced-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
            # Write-ahead logs go with the file they belong to: one left behind would corrupt the restored file.
            old = [home.path / f"{name}{end}" for name in _DATABASES for end in ("", "-wal", "-shm")]
            old = [path for path in [*old, *(home.path / name for name in _FILES)] if path.exists()]
            if old:
                aside.mkdir(mode=0o700)
            for path in old:
                path.replace(aside / path.name)
            for path in fresh:
                path.replace(home.path / path.name)
            return aside if old else None


def _unpack(archive: Path, into: Path) -> list[Path]:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = tar.getmembers()
            known = {*_DATABASES, *_FILES}
            if any(m.name not in known or not m.isfile() for m in members) or "records.db" not in tar.getnames():
                raise InvalidRequest(f"{archive} is not a backup of a Heliostat home.", remedy="Give another archive.")
            for member in members:  # by hand: Debian's 3.11.2 has no extraction filters yet
                stream = tar.extractfile(member)
                assert stream is not None  # a file, as checked above
                with stream, (into / member.name).open("wb") as out:
                    shutil.copyfileobj(stream, out)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InvalidRequest(f"{archive} cannot be read: {error}.", remedy="Give another archive.") from error
    fresh = [into / m.name for m in members]
    for path in fresh:
        path.chmod(0o600)
        if path.name in _DATABASES:
            with contextlib.closing(sqlite3.connect(path)) as database:
                verdict = database.execute("PRAGMA integrity_check").fetchone()[0]
            if verdict != "ok":
                raise InvalidRequest(f"{path.name} in {archive} is damaged: {verdict}.", remedy="Give another archive.")
    return fresh
