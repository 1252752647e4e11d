"""What a proxy counts: requests, errors, latencies, what is under way, and all of that over the last minute."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

LATENCY_BOUNDS_MS = (
    1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700,
    1000, 1500, 2000, 3000, 5000, 7000, 10000, 20000, 30000, 60000,
)  # fmt: skip
"""Upper bounds of the histogram's buckets; the last bucket holds slower answers."""
BUCKETS = len(LATENCY_BOUNDS_MS) + 1
WINDOW_S = 60


class Second:
    """What happened within one second of the window."""

    __slots__ = ("at", "buckets", "errors", "requests")

    def __init__(self, at: int) -> None:
        self.at, self.requests, self.errors = at, 0, 0
        self.buckets = [0] * BUCKETS


class Stats:
    """Of one proxy, HTTP and gRPC together, since its start. Only the proxy's one event loop may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._since = clock()
        self.requests = self.errors = self.refused = self.probes = self.ongoing = 0
        self.buckets = [0] * BUCKETS
        self.last_request_at: float | None = None
        self.waiting: dict[Ticket, None] = {}
        """Requests without a byte of an answer, oldest first."""
        self._ring = [Second(-1) for _ in range(WINDOW_S)]

    def second(self, now: float) -> Second:
        """The counters of this second."""
        at = int(now)
        found = self._ring[at % WINDOW_S]
        if found.at != at:
            found = self._ring[at % WINDOW_S] = Second(at)
        return found

    def start(self) -> Ticket:
        return Ticket(self)

    def snapshot(self) -> dict[str, Any]:
        """The counting fields of ``heliostat.models.agents.ServeTraffic``."""
        now = self.clock()
        window = [s for s in self._ring if now - WINDOW_S < s.at <= now]
        oldest = next(iter(self.waiting), None)
        last = self.last_request_at
        return {
            "requests": self.requests, "errors": self.errors, "refused": self.refused, "probes": self.probes,
            "buckets": list(self.buckets), "ongoing": self.ongoing,
            "oldest_s": round(now - oldest.started_at, 3) if oldest else 0.0,
            "last_request_at": None if last is None else datetime.fromtimestamp(last, UTC).isoformat(),
            "window_s": round(min(now - self._since, WINDOW_S), 3),
            "window_requests": sum(s.requests for s in window), "window_errors": sum(s.errors for s in window),
            "window_buckets": [sum(counts) for counts in zip([0] * BUCKETS, *(s.buckets for s in window), strict=True)],
        }  # fmt: skip


class Ticket:
    """One request, from its start to the end of its answer."""

    __slots__ = ("_open", "_stats", "_waits", "started_at")

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self.started_at = stats.clock()
        self._open = self._waits = True
        stats.ongoing += 1
        stats.waiting[self] = None
        stats.last_request_at = time.time()

    def answered(self) -> None:
        """The answer starts."""
        if self._waits:
            self._waits = False
            stats = self._stats
            del stats.waiting[self]
            now = stats.clock()
            bucket = bisect.bisect_left(LATENCY_BOUNDS_MS, (now - self.started_at) * 1000)
            stats.buckets[bucket] += 1
            stats.second(now).buckets[bucket] += 1

    def end(self, error: bool) -> None:
        """Only the first call counts. A request that ends without an answer counts its whole time as latency: else an
        application that hangs would look fast as soon as its clients give up."""
        if self._open:
            self._open = False
            self.answered()
            stats = self._stats
            stats.ongoing -= 1
            second = stats.second(stats.clock())
            stats.requests += 1
            second.requests += 1
            if error:
                stats.errors += 1
                second.errors += 1
            stats.last_request_at = time.time()


STATS = Stats()
"""Of this process."""
