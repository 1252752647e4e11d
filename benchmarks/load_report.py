"""What a load has seen: counts, failures, latencies, versions, second by second."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.stats import percentile


@dataclass(frozen=True)
class Failure:
    """One request that did not get the whole, right answer."""

    kind: str
    at_s: float
    """When it was due, seconds since the load's start."""
    took_s: float
    error: str
    stage: str
    """How far it got: ``connect``, ``send``, ``answer``, ``body``, ``content``."""
    status: int
    version_id: str
    """By the answer's header; empty when it had not begun."""
    began: bool
    """The answer had begun."""
    idempotent: bool

    def __str__(self) -> str:
        where = f" of {self.version_id}" if self.version_id else ""
        return f"{self.at_s:7.2f} s {self.kind}: {self.error} [{self.stage}, {self.took_s:.2f} s{where}]"


@dataclass
class Seen:
    """A version as its answers show it."""

    version_id: str
    texts: list[str]
    """What its application calls itself; one, unless it was updated in place."""
    ok: int
    first_s: float
    last_s: float
    """When the first and the last of its answers came, seconds since the load's start."""
    last_due_s: float = 0
    """When the youngest request that it answered was due."""


@dataclass
class Second:
    second: int
    sent: int = 0
    """Requests that were due in it."""
    ok: int = 0
    """Answers that came in it, whole and right."""
    failed: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    """Version id (the application's own text where there is no id) → answers, failed ones included."""


@dataclass
class KindReport:
    sent: int = 0
    ok: int = 0
    failed: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None


@dataclass
class Report:
    began_at: str = ""
    """Wall clock, ISO 8601: what the seconds below count from."""
    seconds: float = 0
    sent: int = 0
    ok: int = 0
    failed: int = 0
    kinds: dict[str, KindReport] = field(default_factory=dict)
    versions: dict[str, Seen] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    timeline: list[Second] = field(default_factory=list)
    idle_closed: int = 0
    """Kept connections that the server closed while nothing was under way: no request was sent on them."""
    closes_said: int = 0
    """Kept connections that ended by ``Connection: close``."""
    late_ms: float = 0
    """The most that a request was started after it was due: above some 100 ms the machine was short of processor time
    and latencies, which count from when a request was due, hold that too."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        made = cls(**{k: v for k, v in data.items() if k not in ("kinds", "versions", "failures", "timeline")})
        made.kinds = {k: KindReport(**v) for k, v in data["kinds"].items()}
        made.versions = {k: Seen(**v) for k, v in data["versions"].items()}
        made.failures = [Failure(**f) for f in data["failures"]]
        made.timeline = [Second(**s) for s in data["timeline"]]
        return made

    def texts(self) -> set[str]:
        """What the applications that answered call themselves."""
        return {text for seen in self.versions.values() for text in seen.texts}

    def summary(self) -> str:
        lines = [f"{self.sent} requests in {self.seconds:.0f} s: {self.ok} right, {self.failed} failed"]
        for name, kind in self.kinds.items():
            times = [f"{v:.0f}" if v is not None else "—" for v in (kind.p50_ms, kind.p95_ms, kind.p99_ms)]
            lines.append(f"  {name:<10} {kind.ok:>6} right {kind.failed:>4} failed   p50/p95/p99 {'/'.join(times)} ms")
        for seen in self.versions.values():
            name = f"{seen.version_id or '(no id)'} ({', '.join(seen.texts) or '?'})"
            lines.append(f"  {name:<32} {seen.ok:>6} right, seen {seen.first_s:.1f} – {seen.last_s:.1f} s")
        lines += [f"  {failure}" for failure in self.failures[:20]]
        if len(self.failures) > 20:
            lines.append(f"  … and {len(self.failures) - 20} failures more")
        return "\n".join(lines)


class Tally:
    """Collects while the load runs."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = {name: KindReport() for name in kinds}
        self.latencies: dict[str, list[float]] = {name: [] for name in kinds}
        self.failures: list[Failure] = []
        self.versions: dict[str, Seen] = {}
        self.seconds: dict[int, Second] = {}
        self.idle_closed = self.closes_said = 0
        self.late_s = 0.0

    def second(self, at_s: float) -> Second:
        number = int(at_s)
        return self.seconds.setdefault(number, Second(number))

    def sent(self, kind: str, due_s: float, late_s: float) -> None:
        self.kinds[kind].sent += 1
        self.second(due_s).sent += 1
        self.late_s = max(self.late_s, late_s)

    def ok(self, kind: str, now_s: float, due_s: float, version_id: str, text: str) -> None:
        self.kinds[kind].ok += 1
        self.latencies[kind].append(now_s - due_s)
        second = self.second(now_s)
        second.ok += 1
        seen = self._seen(second, version_id, version_id or text, now_s, due_s)
        if text and text not in seen.texts:
            seen.texts.append(text)
        seen.ok += 1

    def failed(self, failure: Failure, now_s: float) -> None:
        self.kinds[failure.kind].failed += 1
        self.failures.append(failure)
        second = self.second(now_s)
        second.failed += 1
        if failure.version_id:
            self._seen(second, failure.version_id, failure.version_id, now_s, failure.at_s)

    def _seen(self, second: Second, version_id: str, key: str, now_s: float, due_s: float) -> Seen:
        second.versions[key] = second.versions.get(key, 0) + 1
        seen = self.versions.setdefault(key, Seen(version_id, [], 0, round(now_s, 3), 0))
        seen.last_s = round(now_s, 3)
        seen.last_due_s = max(seen.last_due_s, round(due_s, 3))
        return seen

    def report(self, began_at: str, seconds: float) -> Report:
        for name, kind in self.kinds.items():
            taken = [1000 * s for s in self.latencies[name]]
            if taken:
                kind.p50_ms, kind.p95_ms, kind.p99_ms = (round(percentile(taken, p), 1) for p in (50, 95, 99))
        last = max(self.seconds, default=-1)
        return Report(
            began_at=began_at,
            seconds=round(seconds, 2),
            sent=sum(k.sent for k in self.kinds.values()),
            ok=sum(k.ok for k in self.kinds.values()),
            failed=len(self.failures),
            kinds=self.kinds,
            versions=self.versions,
            failures=self.failures,
            timeline=[self.seconds.get(n) or Second(n) for n in range(last + 1)],
            idle_closed=self.idle_closed,
            closes_said=self.closes_said,
            late_ms=round(1000 * self.late_s, 1),
        )
