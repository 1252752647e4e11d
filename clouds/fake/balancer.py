"""Endpoints in memory, with knobs for everything that goes wrong on real ones. For tests and benchmarks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from clouds.contract.balancer import Backend, BackendCounters, Endpoint, EndpointSpec
from clouds.contract.errors import BackendsLost, BadConfig, Denied, Gone, Outdated, Throttled
from heliostat.errors import CloudError
from heliostat.models.services import BACKEND_HEADER


@dataclass
class FakeAnswer:
    status: int
    backend_id: str | None = None
    """Who gave it; None: the load balancer itself."""


@dataclass
class _Fake:
    spec: EndpointSpec
    revision: int = -1
    backends: list[Backend] = field(default_factory=list)
    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    """By version and backend."""
    trouble: str = ""
    lost: bool = False
    credit: Counter[str] = field(default_factory=Counter)
    """Of smooth weighted round-robin, by version and, within one, by backend."""


@dataclass
class FakeBalancer:
    """Endpoints that are entries in a table (``clouds.contract.balancer.LoadBalancer``); ``request`` acts as a
    client. The fields and methods below are knobs and may be turned at any time, from any thread; ``times`` counts
    calls, None is for ever."""

    sleep: Callable[[float], None] = time.sleep
    url: str = "http://fake-balancer.invalid"
    """In front of ``/<service id>``."""
    answer: Callable[[Backend, Mapping[str, str]], int] = lambda _backend, _headers: 200
    """Status of a backend's answer."""

    latency_s: dict[str, float] = field(default_factory=dict)
    """By method name; ``*``: all the others."""
    bad_config: str = ""
    """Every ``ensure`` is refused for good, for this reason."""
    denied: str = ""
    """Every call is refused, for this reason."""
    down: set[str] = field(default_factory=set)
    """Ids of backends that fail their health checks."""

    calls: Counter[str] = field(default_factory=Counter)
    """By method name, failed ones included."""
    applied: list[tuple[str, int, list[Backend]]] = field(default_factory=list)
    """Every (service, revision, backends) that changed something, in order."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._endpoints: dict[str, _Fake] = {}
        self._throttled = 0.0
        self._lost: dict[str, float] = {}
        self._failing: dict[str, float] = {}

    # -- knobs that count

    def throttle(self, times: int | None) -> None:
        """The next calls of any method are refused as too many."""
        self._throttled = _count(times)

    def fail(self, times: int | None, method: str = "set_backends") -> None:
        """The next calls do nothing and fail as one that may be tried again."""
        self._failing[method] = _count(times)

    def lose_answers(self, times: int | None, method: str = "set_backends") -> None:
        """The next calls do their work and then fail as a broken connection does."""
        self._lost[method] = _count(times)

    def restart(self, service_id: str) -> None:
        """It has started again: its counters are at zero."""
        with self._lock:
            self._endpoints[service_id].counts.clear()

    def damage(self, service_id: str, trouble: str) -> None:
        """It answers nothing from now on, until it is repaired."""
        with self._lock:
            self._endpoints[service_id].trouble = trouble

    def lose_backends(self, service_id: str) -> None:
        """It no longer knows which ones it should have, and keeps routing to those that it has."""
        with self._lock:
            self._endpoints[service_id].lost = True

    def request(self, service_id: str, headers: Mapping[str, str] | None = None) -> FakeAnswer:
        """One request of a client; raises Gone where a real one would find nobody."""
        given = {name.lower(): value for name, value in (headers or {}).items()}
        with self._lock:
            held = self._held(service_id)
            if held.trouble:
                return FakeAnswer(502)
            backend = self._named(held, given) if BACKEND_HEADER.lower() in given else self._next(held)
            if backend is None:
                return FakeAnswer(503)
            status = self.answer(backend, given)
            held.counts.setdefault((backend.version_id, backend.id), Counter())[str(status)] += 1
            return FakeAnswer(status, backend.id)

    # -- the contract

    def ensure(self, spec: EndpointSpec, *, make: bool = True) -> Endpoint:
        with self._call("ensure"), self._lock:
            if self.bad_config:
                raise BadConfig(
                    f"The fake cloud refuses {spec.service_id}: {self.bad_config}", resource=spec.service_id
                )
            if not make:
                self._held(spec.service_id)
            held = self._endpoints.setdefault(spec.service_id, _Fake(spec))
            if held.spec.installation_id != spec.installation_id:
                raise BadConfig(f"{spec.service_id} belongs to another installation.", resource=spec.service_id)
            if held.lost:
                raise BackendsLost(f"{spec.service_id} has lost its backends.", resource=spec.service_id)
            held.spec, held.trouble = spec, ""
            return self._endpoint(held)

    def set_backends(self, service_id: str, revision: int, backends: list[Backend]) -> None:
        with self._call("set_backends"), self._lock:
            held = self._held(service_id)
            if held.lost:
                held.revision, held.lost = -1, False
            if revision == held.revision and backends == held.backends:
                return
            if revision <= held.revision:
                raise Outdated.backends(service_id, revision, held.revision)
            kept = {(b.version_id, b.id) for b in backends}
            held.revision, held.backends, held.credit, held.trouble = revision, list(backends), Counter(), ""
            held.counts = {key: count for key, count in held.counts.items() if key in kept}
            self.applied.append((service_id, revision, list(backends)))

    def counters(self, service_id: str) -> list[BackendCounters]:
        with self._call("counters"), self._lock:
            held = self._held(service_id)
            return [
                BackendCounters(
                    backend_id=b.id,
                    version_id=b.version_id,
                    requests=dict(held.counts.get((b.version_id, b.id), Counter())),
                    up=b.id not in self.down,
                )
                for b in held.backends
            ]

    def describe(self, service_id: str) -> Endpoint | None:
        with self._call("describe"), self._lock:
            held = self._endpoints.get(service_id)
            return None if held is None else self._endpoint(held)

    def remove(self, service_id: str) -> None:
        with self._call("remove"), self._lock:
            self._endpoints.pop(service_id, None)

    def list_owned(self, installation_id: str) -> list[str]:
        with self._call("list_owned"), self._lock:
            return sorted(i for i, held in self._endpoints.items() if held.spec.installation_id == installation_id)

    # -- inside

    @contextmanager
    def _call(self, method: str) -> Iterator[None]:
        self.sleep(self.latency_s.get(method, self.latency_s.get("*", 0)))
        with self._lock:
            self.calls[method] += 1
            if self._throttled >= 1:
                self._throttled -= 1
                raise Throttled(f"The fake cloud takes no more calls now ({method}).", remedy="Try again later.")
            if self.denied:
                raise Denied(f"The fake cloud denies {method}: {self.denied}", remedy="Grant the right.")
            if self._failing.get(method, 0) >= 1:
                self._failing[method] -= 1
                raise CloudError(f"The fake cloud fails at {method}.", remedy="Try again.")
        yield
        with self._lock:
            if self._lost.get(method, 0) >= 1:
                self._lost[method] -= 1
                raise CloudError(f"The answer of {method} was lost.", remedy="Try again: the call is repeatable.")

    def _held(self, service_id: str) -> _Fake:
        held = self._endpoints.get(service_id)
        if held is None:
            raise Gone(f"Service {service_id} has no load balancer.", resource=service_id)
        return held

    def _endpoint(self, held: _Fake) -> Endpoint:
        state = held.trouble or ("its backends are lost" if held.lost else "ready")
        return Endpoint(service_id=held.spec.service_id, url=f"{self.url}/{held.spec.service_id}", state=state)

    def _named(self, held: _Fake, headers: Mapping[str, str]) -> Backend | None:
        wanted = headers[BACKEND_HEADER.lower()]
        return next((b for b in held.backends if b.id == wanted and not self._is_out(held, b)), None)

    def _is_out(self, held: _Fake, backend: Backend) -> bool:
        """By health checks, which are of those that have traffic, and of them only where there are several."""
        several = sum(1 for b in held.backends if b.weight) > 1
        return several and backend.weight > 0 and backend.id in self.down

    def _next(self, held: _Fake) -> Backend | None:
        up = [b for b in held.backends if b.weight and not self._is_out(held, b)]
        version = _turn(held.credit, {b.version_id: b.weight for b in up})
        chosen = _turn(held.credit, {b.id: 1 for b in up if b.version_id == version})
        return next((b for b in up if b.id == chosen), None)


def _turn(credit: Counter[str], weights: dict[str, int]) -> str | None:
    """Smooth weighted round-robin; None: there is nobody."""
    if not weights:
        return None
    for name, weight in weights.items():
        credit[name] += weight
    chosen = max(weights, key=lambda name: credit[name])
    credit[chosen] -= sum(weights.values())
    return chosen


def _count(times: int | None) -> float:
    return float("inf") if times is None else times
