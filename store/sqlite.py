"""SQLite: a writer connection without a thread of its own, and a consistent copy of a file in use.

aiosqlite sends each call (cursor, execute, fetch, close) to a thread and back: a transaction of three inserts is
twenty hand-overs, which cost more than SQLite itself (measured: 2.3 ms of CPU against 1.1, and on a busy machine 8 ms
of waiting against 2). Our write transactions are a few statements by key, microseconds each, so they run
right here in the event loop. What may take long does not: waiting for another process's write is a sleep between
tries, and COMMIT, which now and then writes the log back to the file and syncs it, runs on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

FIRST_TRY_AGAIN_S = 0.0005
LAST_TRY_AGAIN_S = 0.02


class Connection:
    """What SQLAlchemy's aiosqlite dialect needs of a driver's connection (``async_creator``)."""

    def __init__(self, path: str, busy_timeout_s: float) -> None:
        # Not its own transactions, no waiting inside a call: both are done here.
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)
        self._busy_timeout_s = busy_timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-commit")

    def cursor(self) -> Cursor:
        return Cursor(self, self._connection.cursor())

    async def commit(self) -> None:
        if self._connection.in_transaction:
            loop = asyncio.get_running_loop()
            await self.patiently(lambda: loop.run_in_executor(self._thread, self._connection.commit))

    async def rollback(self) -> None:
        self._connection.rollback()

    async def close(self) -> None:
        self.stop()

    def stop(self) -> None:
        self._connection.close()
        self._thread.shutdown(wait=False)

    async def create_function(self, *args: Any, **kw: Any) -> None:
        self._connection.create_function(*args, **kw)

    async def patiently(self, call: Callable[[], object]) -> None:
        """Tries again while another connection writes. A statement that was refused as busy has done nothing."""
        deadline, pause = time.monotonic() + self._busy_timeout_s, FIRST_TRY_AGAIN_S
        while True:
            try:
                if isinstance(running := call(), asyncio.Future):
                    await running
                return
            except sqlite3.OperationalError as e:
                if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, LAST_TRY_AGAIN_S)


class Cursor:
    def __init__(self, connection: Connection, cursor: sqlite3.Cursor) -> None:
        self._connection = connection
        self._cursor = cursor

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, statement: str, parameters: Any = ()) -> Self:
        await self._connection.patiently(lambda: self._cursor.execute(statement, parameters))
        return self

    async def executemany(self, statement: str, parameters: Any) -> Self:
        await self._connection.patiently(lambda: self._cursor.executemany(statement, parameters))
        return self

    async def fetchall(self) -> list[Any]:
        return self._cursor.fetchall()

    async def close(self) -> None:
        self._cursor.close()

    @property
    def description(self) -> Any:
        return self._cursor.description

    @property
    def rowcount(self) -> int:
        return self._cursor.rowcount

    @property
    def lastrowid(self) -> int | None:
        return self._cursor.lastrowid


def copy_database(source: Path, target: Path) -> None:
    """A consistent copy of a SQLite file that may be in use (SQLite's own online backup), 0600."""
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
    with contextlib.closing(sqlite3.connect(source, timeout=30)) as old:
        with contextlib.closing(sqlite3.connect(target)) as new:
            old.backup(new)
            # The copy inherits WAL mode; without it, it is one file, complete in itself.
            new.execute("PRAGMA journal_mode=DELETE")
