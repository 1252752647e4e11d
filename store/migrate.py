"""``python -m store.migrate``: brings the records to this code's schema. Settings from the environment.

A SQLite file that is at another schema is copied to ``<home>/backups`` first.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.engine import make_url

from heliostat.errors import Conflict, HeliostatError
from runtime.home import Home
from runtime.settings import Settings
from store.database import Database, known_revisions, latest_revision, migrate
from store.sqlite import copy_database


async def save_first(url: str, home: Home) -> Path | None:
    """Copies records that a migration is about to change; None: nothing to copy. PostgreSQL is its operator's.
    Raises Conflict when the records belong to newer code."""
    db = Database(url)
    source = Path(str(make_url(url).database))
    try:
        is_new = db.is_sqlite and not await asyncio.to_thread(source.exists)
        there = None if is_new else await db.schema_revision()
    finally:
        await db.dispose()
    if there is not None and there not in known_revisions():
        raise Conflict(
            f"The records are at schema {there}, which this code does not know.",
            remedy="Newer code has written them: start that code, or restore a backup from before it.",
        )
    if there is None or there == latest_revision() or not db.is_sqlite:
        return None
    home.create()
    target = home.backups / f"records-at-{there}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.db"
    await asyncio.to_thread(copy_database, source, target)
    return target


async def run(settings: Settings) -> str:
    """Migrates; says what was done."""
    home = Home(settings.home)
    home.create()
    saved = await save_first(settings.records_url, home)
    await migrate(settings.records_url)
    return f"records are at schema {latest_revision()}" + (f"; a copy of what they were is {saved}" if saved else "")


def main() -> int:
    try:
        print(asyncio.run(run(Settings())))  # noqa: T201  the command's answer
    except HeliostatError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
