"""Long polls of agents. One poller per process queries the records for all that wait here: a long poll costs no query
of its own."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from heliostat.errors import HeliostatError, Unavailable
from heliostat.models.agents import HeadAddress
from runtime.telemetry import COMMANDS_OPEN
from store.commands import OpenCommand, open_command_ids, open_commands
from store.database import Database
from store.nodes import head_addresses

POLL_S = 0.04
"""Between two queries while somebody waits: a command's delay by it is half of this on average."""
REST_POLL_S = 0.2
REST_AFTER_S = 60.0
"""Between two queries once nothing new has been found for this long: an idle cluster costs next to nothing."""


@dataclass(eq=False)
class _Waiter:
    key: str
    """Node id (commands) or cluster id (head)."""
    known: frozenset[str]
    done: asyncio.Future[HeadAddress | None]


@dataclass
class Polls:
    db: Database
    _commands: set[_Waiter] = field(default_factory=set)
    _heads: set[_Waiter] = field(default_factory=set)
    _somebody: asyncio.Event = field(default_factory=asyncio.Event)
    _found_at: float = field(default_factory=time.monotonic)

    async def commands(self, node_id: str, known: frozenset[str], wait_s: float) -> list[OpenCommand]:
        """All open ones: as soon as one of them is not in ``known``, else after ``wait_s``."""
        await self._wait(self._commands, node_id, known, wait_s)
        return await open_commands(self.db, [node_id])

    async def head(self, cluster_id: str, wait_s: float) -> HeadAddress | None:
        found = await self._wait(self._heads, cluster_id, frozenset(), wait_s)
        if found is not None:
            return found
        async with self.db.read() as conn:
            return (await head_addresses(conn, [cluster_id])).get(cluster_id)

    async def _wait(self, waiters: set[_Waiter], key: str, known: frozenset[str], wait_s: float) -> HeadAddress | None:
        waiter = _Waiter(key, known, asyncio.get_running_loop().create_future())
        waiters.add(waiter)
        self._somebody.set()
        try:
            async with asyncio.timeout(wait_s):
                return await waiter.done
        except TimeoutError:
            return None
        finally:
            waiters.discard(waiter)

    async def run(self) -> None:
        """Until cancelled; asleep while nobody waits."""
        while True:
            await self._somebody.wait()
            try:
                await self._poll()
            except Unavailable as e:
                self._fail_all(e)
            if not self._commands and not self._heads:
                self._somebody.clear()
            busy = bool(self._heads) or time.monotonic() - self._found_at < REST_AFTER_S
            await asyncio.sleep(POLL_S if busy else REST_POLL_S)

    def _fail_all(self, error: HeliostatError) -> None:
        for waiter in (*self._commands, *self._heads):
            if not waiter.done.done():
                waiter.done.set_exception(error)

    async def _poll(self) -> None:
        if self._commands:
            async with self.db.read() as conn:
                open_ids = await open_command_ids(conn)
            COMMANDS_OPEN.set(sum(map(len, open_ids.values())))
            for waiter in self._commands:
                if not waiter.done.done() and open_ids.get(waiter.key, set()) - waiter.known:
                    waiter.done.set_result(None)
                    self._found_at = time.monotonic()
        if self._heads:
            async with self.db.read() as conn:
                found = await head_addresses(conn, [w.key for w in self._heads])
            for waiter in self._heads:
                if waiter.key in found and not waiter.done.done():
                    waiter.done.set_result(found[waiter.key])
