"""The connection to the records: SQLite for one API process, PostgreSQL for more; one set of queries for both."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Table, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection as AsyncConnection  # in the name of all who pass one on
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from heliostat.errors import Unavailable
from store.sqlite import Connection

BUSY_TIMEOUT_MS = 10_000
"""How long a SQLite writer waits for another process's write: the worker and the API share the file."""

READERS = 4
"""SQLite read connections of one process: each is a thread."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 4_815_162_342  # any constant: PostgreSQL's advisory lock of our migrations


class Database:
    """The records. Every failure to reach them is raised as ``Unavailable``.

    SQLite runs in WAL mode with ``synchronous=NORMAL``: a commit is in the operating system's hands before
    it returns, so kill -9 of any process loses nothing; only a power cut may lose the last moments, never
    the file's integrity. Writers begin with ``BEGIN IMMEDIATE``: a transaction that reads first and
    writes later would else fail at once when another process has written in between.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = make_url(url).get_backend_name() == "sqlite"
        if self.is_sqlite:
            self._writer, self._reader = _sqlite_writer(url), _sqlite_reader(url)
        else:
            self._writer = self._reader = create_async_engine(
                url,
                pool_size=10,
                max_overflow=10,
                pool_timeout=10,
                pool_pre_ping=True,
                connect_args={"connect_timeout": 5},
            )

    async def connect(self) -> None:
        """Opens a connection to see that the records answer. Raises ``Unavailable``."""
        async with self.read() as conn:
            await conn.execute(text("SELECT 1"))

    async def dispose(self) -> None:
        await self._writer.dispose()
        if self._reader is not self._writer:
            await self._reader.dispose()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """A write transaction: committed at the end, rolled back by any exception."""
        with _away(self.url):
            async with self._writer.begin() as conn:
                yield conn

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reading: each statement sees what was committed before it; it never waits for a writer."""
        with _away(self.url):
            async with self._reader.connect() as conn:
                yield conn

    async def schema_revision(self) -> str | None:
        """The migration that the records are at; None: never migrated."""
        from alembic.runtime.migration import MigrationContext

        async with self.read() as conn:
            return await conn.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())


def sqlite_file(url: str) -> Path | None:
    """The file of SQLite records; None: they are on a database server."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def insert(conn: AsyncConnection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """INSERT that can say ON CONFLICT, in the dialect of this connection."""
    return sqlite.insert(table) if conn.dialect.name == "sqlite" else postgresql.insert(table)


async def insert_new(conn: AsyncConnection, table: Table, row: dict[str, Any]) -> bool:
    """Inserts a row unless one of its keys is there already; False: it was."""
    return (await conn.execute(_new(conn.dialect.name, table), row)).first() is not None


@functools.cache
def _new(dialect: str, table: Table) -> Any:
    # Built once: to build such a statement costs more than to carry it out.
    insert = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    return insert.on_conflict_do_nothing().returning(*table.primary_key.columns)


def latest_revision() -> str:
    """The newest migration that this code knows."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    assert head is not None
    return head


def known_revisions() -> set[str]:
    """Every migration that this code knows."""
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory(str(_MIGRATIONS)).walk_revisions()}


async def migrate(url: str) -> None:
    """Brings the records to this code's schema, in one transaction. Safe when two processes start at once:
    the second waits for the first and then has nothing to do. Raises ``Unavailable``."""
    db = Database(url)
    try:
        async with db.begin() as conn:
            if not db.is_sqlite:
                await conn.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _MIGRATION_LOCK})
            await conn.run_sync(_upgrade)
    finally:
        await db.dispose()


def _upgrade(connection: sqlalchemy.Connection) -> None:
    from alembic import command

    command.upgrade(alembic_config(connection), "head")


def alembic_config(connection: sqlalchemy.Connection) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _sqlite_writer(url: str) -> AsyncEngine:
    path = make_url(url).database or ""

    async def connect(*_: Any, **__: Any) -> Connection:
        return Connection(path, BUSY_TIMEOUT_MS / 1000)

    # One connection: SQLite has one writer anyway, and waiting for our own turn in the pool is fair.
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=30, async_creator=connect)

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(dbapi_connection: Any, _record: Any) -> None:
        _pragmas(dbapi_connection, "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "cache_size=-32768")

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(conn: sqlalchemy.Connection) -> None:
        conn.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _sqlite_reader(url: str) -> AsyncEngine:
    # On threads, since a list may have to look through much; without BEGIN and ROLLBACK, each two hand-overs more.
    engine = create_async_engine(
        url,
        pool_size=READERS,
        max_overflow=0,
        pool_timeout=30,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        connect_args={"timeout": BUSY_TIMEOUT_MS / 1000},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(dbapi_connection: Any, _record: Any) -> None:
        # WAL first: the reader may be the first who opens a new file. Writing is the other engine's.
        _pragmas(dbapi_connection, "journal_mode=WAL", "cache_size=-32768", "query_only=ON")

    return engine


def _pragmas(dbapi_connection: Any, *pragmas: str) -> None:
    cursor = dbapi_connection.cursor()
    for pragma in pragmas:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@contextmanager
def _away(url: str) -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as e:
        if isinstance(e, DBAPIError) and "no such" in str(e.orig):
            raise  # our own mistake or a missing migration: not a matter of trying again
        where = make_url(url).render_as_string(hide_password=True)
        cause = str(e.orig if isinstance(e, DBAPIError) else e).strip().splitlines()[0]
        raise Unavailable(
            f"The records ({where}) are unreachable: {cause}",
            remedy="Try again. If the error persists: does it run, has it disk space, is HELIOSTAT_DATABASE_URL right?",
        ) from e
