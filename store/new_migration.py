"""``python -m store.new_migration "what changes"``: the migration to ``store/tables.py`` as it is now."""

from __future__ import annotations

import asyncio
import sys
import tempfile

from sqlalchemy.engine import Connection

from store.database import Database, alembic_config, migrate


def _write(connection: Connection) -> None:
    from alembic import command

    command.revision(alembic_config(connection), message=sys.argv[1], autogenerate=True)


async def _main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite+aiosqlite:///{folder}/records.db"
        await migrate(url)
        db = Database(url)
        try:
            async with db.begin() as conn:
                await conn.run_sync(_write)
        finally:
            await db.dispose()


if __name__ == "__main__":
    asyncio.run(_main())
