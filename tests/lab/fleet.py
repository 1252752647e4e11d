"""All hosts of the lab: booted and ended as the vendors say, side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tests.lab.host import Host, Identity

BOOTS_AT_ONCE = 4


class Fleet:
    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(BOOTS_AT_ONCE, thread_name_prefix="boot")
        self._lock = threading.Lock()
        self._booting: dict[str, Future[Host]] = {}
        self.problems: list[BaseException] = []
        """What went wrong in the lab itself; a test that finds some has failed."""

    def boot(self, identity: Identity, on_end: Callable[[Host], None]) -> None:
        """Returns at once."""
        with self._lock:
            self._booting[identity.id] = future = self._pool.submit(Host, identity, on_end)
        future.add_done_callback(self._noted)

    def _noted(self, future: Future[Host]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self.problems.append(error)

    def power_cut(self, machine_id: str) -> None:
        """Returns when nothing of it is left: after its boot, where that is under way. Nothing, where there is no such
        host any more."""
        with self._lock:
            future = self._booting.pop(machine_id, None)
        if future is not None and not future.cancel() and future.exception() is None:
            future.result().power_cut()

    def get(self, machine_id: str) -> Host | None:
        with self._lock:
            future = self._booting.get(machine_id)
        return future.result() if future is not None and future.done() and future.exception() is None else None

    def hosts(self) -> list[Host]:
        """That are on."""
        with self._lock:
            ids = list(self._booting)
        return [host for host in map(self.get, ids) if host is not None and host.alive]

    def by_ip(self, address: str) -> Host | None:
        return next((host for host in self.hosts() if host.ip == address), None)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for host in self.hosts():
            host.power_cut()
