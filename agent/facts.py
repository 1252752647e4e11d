"""Changes that the control plane must learn of: kept on disk, told in order, until it says that it has them."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from agent.journal import Journal

log = logging.getLogger("agent.facts")
SUPERSEDED = ("activity", "serve")
"""A newer fact of these kinds makes the older ones worthless; of all others each counts."""
COMPACT_AFTER = 500
PER_REPORT = 100


def now() -> str:
    return datetime.now(UTC).isoformat()


class Facts:
    def __init__(self, journal: Journal, boot_id: str, limit: int) -> None:
        self._journal = journal
        self._limit = limit
        self._prefix = boot_id[:8]
        self._count = itertools.count(1)
        self._lock = threading.Lock()
        self._facts: dict[str, dict[str, Any]] = {}
        self._lines = len(journal.records)
        self.wake: Callable[[], None] = lambda: None
        for record in journal.records:
            if "fact" in record:
                self._facts[record["fact"]["id"]] = record["fact"]
            for fact_id in record.get("acked", ()):
                self._facts.pop(fact_id, None)

    def add(self, kind: str, /, **data: Any) -> str:
        """Keeps a fact and wakes the reporter. Returns the fact's id. ``data`` holds no secret."""
        fact_id = f"{self._prefix}-{next(self._count)}"
        fact = {"id": fact_id, "kind": kind, "at": now(), "data": data}
        with self._lock:
            self._facts[fact_id] = fact
            try:
                self._journal.append({"fact": fact})
                self._lines += 1
            except OSError as error:
                # It is told from memory all the same; only a crash before the next report could lose it.
                log.error("fact %s (%s) is not on disk: %s", fact_id, kind, error)
            if len(self._facts) > self._limit:
                old = next((i for i, f in self._facts.items() if f["kind"] in SUPERSEDED), next(iter(self._facts)))
                log.error("too many facts wait for the control plane; dropped %s", self._facts.pop(old))
        log.info("fact %s %s %s", fact_id, kind, data)
        self.wake()
        return fact_id

    def pending(self) -> list[dict[str, Any]]:
        """The next facts to tell, oldest first."""
        with self._lock:
            return list(itertools.islice(self._facts.values(), PER_REPORT))

    def waits(self, fact_id: str) -> bool:
        with self._lock:
            return fact_id in self._facts

    def ack(self, ids: list[str]) -> None:
        with self._lock:
            known = [i for i in ids if self._facts.pop(i, None) is not None]
            if not known:
                return
            try:
                self._journal.append({"acked": known})
                self._lines += 1
                if self._lines > COMPACT_AFTER:
                    self._journal.rewrite([{"fact": f} for f in self._facts.values()])
                    self._lines = len(self._facts)
            except OSError as error:
                log.error("acknowledged facts will be told again after a restart: %s", error)
