"""Events for the control plane (``facts`` on the wire): kept on disk and reported, in order, until it acknowledges
them."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from agent.journal import Journal

log = logging.getLogger("agent.events")
SUPERSEDED = ("activity", "serve")
"""Of these kinds only the newest event matters; of all others each counts."""
COMPACT_AFTER = 500
PER_REPORT = 100


def now() -> str:
    return datetime.now(UTC).isoformat()


class Events:
    def __init__(self, journal: Journal, boot_id: str, limit: int) -> None:
        self._journal = journal
        self._limit = limit
        self._prefix = boot_id[:8]
        self._count = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[str, dict[str, Any]] = {}
        self._lines = len(journal.records)
        self.on_new: Callable[[], None] = lambda: None
        for record in journal.records:
            if "fact" in record:
                self._pending[record["fact"]["id"]] = record["fact"]
            for event_id in record.get("acked", ()):
                self._pending.pop(event_id, None)

    def add(self, kind: str, /, **data: Any) -> str:
        """Keeps an event and wakes the reporter. Returns the event's id. ``data`` holds no secret."""
        event_id = f"{self._prefix}-{next(self._count)}"
        event = {"id": event_id, "kind": kind, "at": now(), "data": data}
        with self._lock:
            self._pending[event_id] = event
            try:
                self._journal.append({"fact": event})
                self._lines += 1
            except OSError as error:
                # It is reported from memory all the same; only a crash before the next report loses it.
                log.error("event %s (%s) is not on disk: %s", event_id, kind, error)
            if len(self._pending) > self._limit:
                old = next((i for i, e in self._pending.items() if e["kind"] in SUPERSEDED), next(iter(self._pending)))
                log.error("too many pending events; dropped %s", self._pending.pop(old))
        log.info("event %s %s %s", event_id, kind, data)
        self.on_new()
        return event_id

    def pending(self) -> list[dict[str, Any]]:
        """The next events to report, oldest first."""
        with self._lock:
            return list(itertools.islice(self._pending.values(), PER_REPORT))

    def is_pending(self, event_id: str) -> bool:
        with self._lock:
            return event_id in self._pending

    def acknowledge(self, ids: list[str]) -> None:
        with self._lock:
            known = [i for i in ids if self._pending.pop(i, None) is not None]
            if not known:
                return
            try:
                self._journal.append({"acked": known})
                self._lines += 1
                if self._lines > COMPACT_AFTER:
                    self._journal.rewrite([{"fact": event} for event in self._pending.values()])
                    self._lines = len(self._pending)
            except OSError as error:
                log.error("acknowledged events will be reported again after a restart: %s", error)
