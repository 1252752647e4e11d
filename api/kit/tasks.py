"""Work of one API process that no request waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import structlog

from heliostat.errors import Unavailable
from store.acceptance import mark_started
from store.database import Database

log = structlog.get_logger(__name__)

MARK_AFTER_S = 0.2
"""One write transaction per start would be a third of the cost of accepting; several starts share one."""


class BackgroundTasks:
    """Holds tasks until they end: the event loop itself keeps only weak references."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def wait(self) -> None:
        """Until all that run now have ended. A failure is the task's own to log."""
        await asyncio.gather(*self._running, return_exceptions=True)


class StartedBatch:
    """Marks rows whose workflows this process has started. If the write fails, or the process dies before it, the
    monitor starts the workflows again, which changes nothing."""

    def __init__(self, db: Database, tasks: BackgroundTasks) -> None:
        self._db, self._tasks = db, tasks
        self._ids: list[str] = []

    def add(self, id: str) -> None:
        self._ids.append(id)
        if len(self._ids) == 1:  # otherwise the task that waits writes this one too
            self._tasks.start(self._write())

    async def _write(self) -> None:
        await asyncio.sleep(MARK_AFTER_S)
        ids, self._ids = self._ids, []
        try:
            async with self._db.begin() as conn:
                await mark_started(conn, ids)
        except Unavailable as e:
            log.warning("started workflows are not marked", resources=ids, why=str(e))
