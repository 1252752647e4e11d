"""Requests, errors and latencies of services' versions for Prometheus, from the reports of heads on their proxies.

Each API process counts from the first report that it receives of a proxy, as counters do. Several API processes behind
one address each count the difference between two reports that they themselves received, so take one process's series
of a version, not the sum.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from heliostat.models.agents import ServeTraffic
from heliostat.models.services import LATENCY_BOUNDS_MS
from store.database import Database
from store.services.rows import load_service, load_version

LABELS = ["service_id", "service", "version", "project"]
"""The id, because a name is unique only within its project, a project's within its organization, and both may be
reused."""
FORGET_S = 3600.0
"""After this long without a report a version's series end: labels must not grow without limit."""

BUCKETS = len(LATENCY_BOUNDS_MS) + 1
_BOUNDS = [*(str(bound / 1000) for bound in LATENCY_BOUNDS_MS), "+Inf"]
_MIDDLE_S = [
    (low + high) / 2000
    for low, high in zip((0, *LATENCY_BOUNDS_MS), (*LATENCY_BOUNDS_MS, LATENCY_BOUNDS_MS[-1]), strict=True)
]
"""What an answer of each bucket adds to the histogram's sum: proxies report counts only."""


@dataclass
class _Total:
    labels: tuple[str, ...]
    requests: int = 0
    errors: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    at: float = 0.0

    def add(self, other: _Total) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.buckets = [mine + more for mine, more in zip(self.buckets, other.buckets, strict=True)]


@dataclass(eq=False)
class ServeTotals(Collector):
    """One of each process, registered once."""

    _last: dict[str, tuple[float, ServeTraffic]] = field(default_factory=dict)
    """By node: when it reported last, and what."""
    _totals: dict[str, _Total] = field(default_factory=dict)
    """By version."""

    async def add(self, db: Database, node_id: str, service_id: str, traffic: ServeTraffic) -> None:
        """A head's report. Looks up the names of a version once."""
        now = time.monotonic()
        if len(traffic.buckets) not in (0, BUCKETS):
            return
        _, before = self._last.get(node_id, (now, traffic))
        self._last[node_id] = (now, traffic)
        if not traffic.version_id:
            return
        if traffic.version_id not in self._totals:
            labels = await _labels(db, service_id, traffic.version_id)
            if labels is None:
                return
            self._forget(now)
            self._totals.setdefault(traffic.version_id, _Total(labels))
        total = self._totals[traffic.version_id]
        total.at = now
        if traffic.requests < before.requests:
            before = ServeTraffic()  # the proxy has restarted
        total.requests += traffic.requests - before.requests
        total.errors += max(traffic.errors - before.errors, 0)
        old = before.buckets or [0] * BUCKETS
        for i, count in enumerate(traffic.buckets):
            total.buckets[i] += max(count - old[i], 0)

    def _forget(self, now: float) -> None:
        self._last = {node: seen for node, seen in self._last.items() if now - seen[0] < FORGET_S}
        self._totals = {version: total for version, total in self._totals.items() if now - total.at < FORGET_S}

    def collect(self) -> Iterator[Metric]:
        """Each set of labels once, whatever names the records hold: a repeated series would make Prometheus reject the
        whole answer."""
        requests = CounterMetricFamily("heliostat_service_requests", "Requests that a version answered.", labels=LABELS)
        errors = CounterMetricFamily(
            "heliostat_service_errors", "Of them: answered 5xx, or aborted by the application.", labels=LABELS
        )
        latency = HistogramMetricFamily(
            "heliostat_service_latency_seconds",
            "Until the answer began; the sum is computed from the middles of the buckets.",
            labels=LABELS,
        )
        merged: dict[tuple[str, ...], _Total] = {}
        for one in list(self._totals.values()):
            merged.setdefault(one.labels, _Total(one.labels)).add(one)
        for total in merged.values():
            labels = list(total.labels)
            requests.add_metric(labels, total.requests)
            errors.add_metric(labels, total.errors)
            grown, sums = 0, []
            for bound, count in zip(_BOUNDS, total.buckets, strict=True):
                grown += count
                sums.append((bound, grown))
            seconds = sum(middle * count for middle, count in zip(_MIDDLE_S, total.buckets, strict=True))
            latency.add_metric(labels, sums, seconds)
        yield from (requests, errors, latency)


async def _labels(db: Database, service_id: str, version_id: str) -> tuple[str, ...] | None:
    service, version = await load_service(db, service_id), await load_version(db, version_id)
    if service is None or version is None or version.service_id != service.id:
        return None
    return service.id, service.name, version.name, service.service.project


TOTALS = ServeTotals()
REGISTRY.register(TOTALS)
