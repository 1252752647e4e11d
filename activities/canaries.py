"""The canary: compares the new version's traffic with the running version's, as the gates in their proxies have counted
and the heads have reported it. One activity watches for the length of a step, which costs no history."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from math import inf, sqrt
from typing import Any

from temporalio import activity

from heliostat.models.agents import ServeTraffic
from heliostat.models.common import Model, utcnow
from heliostat.models.services import LATENCY_BOUNDS_MS, RolloutConfig, quantile
from store.database import Database
from store.services.traffic import latest_traffic

POLL_S = 0.5
"""Between two polls; heads report once a second."""

UNHEARD_S = 15.0
"""All heads of the canary, or their proxies, silent for so long: it fails, whatever it did before."""

HANG_MIN_S, HANG_MAX_S = 3.0, 30.0
"""A request of the canary that waits for its answer's first byte longer than ``max_latency_ratio`` times the running
version's 99th percentile, and longer than any of that one's ever did, but at least and at most so long, counts as
hanging."""
HANG_ANSWERS_S = 10.0
"""The least for a canary that answers other requests meanwhile: one that takes long may be of a rare kind."""

HANG_UNKNOWN_S = 10.0
"""The limit where nothing is known of the running version's latency."""

CHANCE = 3.0
"""Standard deviations of the running version's share of errors, or of slow answers, that the canary's may lie above it
by chance: it is judged many times a step."""

ERRORS_MIN = 2
"""A single failed answer proves nothing about a version: of ten answers it would be a tenth."""

SLOW_MIN = 3
"""The same of slow ones, of which each new replica has a first."""


class WatchStep(Model):
    canary: list[str]
    """Cluster ids of the new version."""
    running: list[str]
    """Of those that it is compared with; empty: it is judged by itself."""
    rules: RolloutConfig
    hold_s: float
    window_s: float | None = None
    """The count begins anew after each such time, since older answers prove nothing. None: one count for the whole
    hold."""


class StepVerdict(Model):
    breach: str = ""
    """Which threshold was exceeded, and by what; "" when none was."""
    observed: str = ""


class LastTraffic(Model):
    """``at``: of the newest request; ``known`` is False when a head has not reported, which counts as busy."""

    known: bool
    at: datetime | None = None


class Sum(Model):
    """Traffic of one version's clusters since the step began."""

    requests: int = 0
    errors: int = 0
    buckets: list[int] = []
    ongoing: int = 0
    oldest_s: float = 0

    def text(self) -> str:
        p95 = quantile(self.buckets, 0.95)
        return f"{self.requests} answers, {self.errors} errors, p95 " + ("-" if p95 is None else f"{p95:.0f} ms")


def since(now: ServeTraffic, then: ServeTraffic | None) -> Sum:
    """The traffic of one head's proxy since ``then``; all of it when the proxy has been restarted meanwhile."""
    buckets = now.buckets or [0] * (len(LATENCY_BOUNDS_MS) + 1)
    if then is None or now.requests < then.requests or sum(buckets) < sum(then.buckets):
        then = ServeTraffic()
    before = then.buckets or [0] * len(buckets)
    return Sum(
        requests=now.requests - then.requests,
        errors=max(now.errors - then.errors, 0),
        buckets=[max(a - b, 0) for a, b in zip(buckets, before, strict=True)],
        ongoing=now.ongoing,
        oldest_s=now.oldest_s if now.ongoing else 0,
    )


def together(parts: list[Sum]) -> Sum:
    size = len(LATENCY_BOUNDS_MS) + 1
    return Sum(
        requests=sum(p.requests for p in parts),
        errors=sum(p.errors for p in parts),
        buckets=[sum(p.buckets[i] for p in parts) for i in range(size)],
        ongoing=sum(p.ongoing for p in parts),
        oldest_s=max((p.oldest_s for p in parts), default=0),
    )


def judge(rules: RolloutConfig, canary: Sum, running: Sum, ever: Sum) -> str:
    """The threshold that the canary exceeds, "" if none. ``ever``: the running version since its start, for where the
    step itself has too little of its traffic."""
    enough = canary.requests >= rules.min_requests
    reference = running if running.requests >= rules.min_requests else ever
    usual = reference.errors / reference.requests if reference.requests else 0.0
    if enough:
        share = canary.errors / canary.requests
        # Of few answers a version that is no worse than the running one may have more bad ones by chance.
        chance = CHANCE * sqrt(usual * (1 - usual) / canary.requests)
        if canary.errors >= ERRORS_MIN and share > usual + rules.max_error_rate + chance:
            return (
                f"{canary.errors} of {canary.requests} answers failed ({share:.1%}); "
                f"allowed are {rules.max_error_rate + chance:.1%} above the running version's {usual:.1%}"
            )
        p95, theirs = quantile(canary.buckets, 0.95), quantile(reference.buckets, 0.95)
        if p95 is not None and theirs is not None:
            limit = max(rules.min_latency_ms, rules.max_latency_ratio * theirs)
            slow = slower(canary.buckets, limit)
            usual = max(slower(s.buckets, limit) / max(sum(s.buckets), 1) for s in (reference, ever))
            answers = max(sum(canary.buckets), 1)
            # Where one in thirty is slow by nature, of forty answers three are by chance, and p95 is one of these.
            chance = CHANCE * sqrt(usual * (1 - usual) / answers)
            if p95 > limit and slow >= SLOW_MIN and slow / answers > usual + chance:
                return f"p95 {p95:.0f} ms; allowed are {limit:.0f} ms (the running version's is {theirs:.0f} ms)"
    if canary.ongoing and canary.oldest_s > hang_limit_s(rules, ever, bool(canary.requests)):
        return f"a request still waits for its answer after {canary.oldest_s:.0f} s"
    return ""


def slower(buckets: list[int], limit_ms: float) -> int:
    """How many answers took longer; those in the bucket that the limit lies in count as slower."""
    return sum(count for count, bound in zip(buckets, (*LATENCY_BOUNDS_MS, inf), strict=True) if bound > limit_ms)


def hang_limit_s(rules: RolloutConfig, ever: Sum, answers: bool) -> float:
    """``answers``: the canary answers other requests."""
    usual, slowest = quantile(ever.buckets, 0.99), quantile(ever.buckets, 1.0)
    if usual is None or slowest is None:
        return HANG_UNKNOWN_S
    least = HANG_ANSWERS_S if answers else HANG_MIN_S
    return min(max(rules.max_latency_ratio * usual / 1000, slowest / 1000, least), HANG_MAX_S)


class CanaryActivities:
    def __init__(self, db: Database) -> None:
        self._db = db

    @activity.defn
    async def watch_canary(self, step: WatchStep) -> StepVerdict:
        """Returns at once at a breach, or after ``hold_s`` without one; later while the canary has requests and has
        answered none yet. A worker that takes over continues from the heartbeat's baseline."""
        began, turned, baseline = self._resumed()
        silent_since: float | None = None
        while True:
            found = await latest_traffic(self._db, step.canary + step.running)
            now = utcnow()
            if baseline is None or (step.window_s is not None and time.time() - turned >= step.window_s):
                turned, baseline = time.time(), {i: t for i, (t, _) in found.items()}
            activity.heartbeat(began, turned, {i: t.model_dump(mode="json") for i, t in baseline.items()})
            fresh = {i: t for i, (t, at) in found.items() if t.alive and (now - at).total_seconds() < UNHEARD_S}
            canary = together([since(fresh[i], baseline.get(i)) for i in step.canary if i in fresh])
            running = together([since(fresh[i], baseline.get(i)) for i in step.running if i in fresh])
            ever = together([since(fresh[i], None) for i in step.running if i in fresh])
            observed = f"new: {canary.text()}; running: {running.text()}"
            if breach := judge(step.rules, canary, running, ever):
                return StepVerdict(breach=breach, observed=observed)
            if any(i in fresh for i in step.canary):
                silent_since = None
            else:
                silent_since = silent_since or time.time()
                if time.time() - silent_since > UNHEARD_S:
                    return StepVerdict(
                        breach=f"its proxies have sent no report for {UNHEARD_S:.0f} s", observed=observed
                    )
            unanswered = canary.ongoing > 0 and canary.requests == 0
            if time.time() - began >= step.hold_s and silent_since is None and not unanswered:
                return StepVerdict(observed=observed)
            await asyncio.sleep(min(POLL_S, max(began + step.hold_s - time.time(), 0.05)))

    def _resumed(self) -> tuple[float, float, dict[str, ServeTraffic] | None]:
        """When it began, when its count began, and from what."""
        details: tuple[Any, ...] = tuple(activity.info().heartbeat_details)
        if len(details) == 3 and isinstance(details[2], dict):
            baseline = {i: ServeTraffic.model_validate(t) for i, t in details[2].items()}
            return float(details[0]), float(details[1]), baseline
        return time.time(), time.time(), None

    @activity.defn
    async def last_traffic(self, cluster_ids: list[str]) -> LastTraffic:
        """When the newest request of all these clusters came."""
        found = await latest_traffic(self._db, cluster_ids)
        now = utcnow()
        known = [t for t, at in found.values() if t.alive and (now - at).total_seconds() < UNHEARD_S]
        if len(known) < len(cluster_ids) or any(t.ongoing for t in known):
            return LastTraffic(known=False)
        return LastTraffic(known=True, at=max((t.last_request_at for t in known if t.last_request_at), default=None))
