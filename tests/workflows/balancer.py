"""A load balancer in memory that remembers all that it was told, and notes what would have cost somebody a request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clouds.base import Backend, BackendCounters, Endpoint, EndpointSpec, Gone
from heliostat.errors import CloudError

if TYPE_CHECKING:
    from tests.workflows.fleet import FakeAgent, FakeFleet


@dataclass(frozen=True)
class Told:
    """What it was told once."""

    service_id: str
    revision: int
    backends: list[Backend]

    @property
    def shares(self) -> dict[str, float]:
        """Percent by version, those with none left out."""
        weights: dict[str, int] = {}
        for backend in self.backends:  # one of a version's clusters may wait at 0
            weights[backend.version_id] = max(backend.weight, weights.get(backend.version_id, 0))
        total = sum(weights.values())
        return {v: 100 * w / total for v, w in weights.items() if w}


@dataclass
class WatchedBalancer:
    """``clouds.base.LoadBalancer``. The fields and the methods below are knobs."""

    fleet: FakeFleet
    installation_id: str
    latency_s: float = 0
    """Each call takes so long."""
    history: list[Told] = field(default_factory=list)
    wrongs: list[str] = field(default_factory=list)
    """What it was told that would have cost requests: a test's world ends with none."""
    calls: Counter[str] = field(default_factory=Counter)
    """By method, failed ones included."""
    forgiven: set[str] = field(default_factory=set)
    """Clusters and services whose ends the test itself brought about: they are not held against the workflow."""
    specs: dict[str, EndpointSpec] = field(default_factory=dict)
    requests: dict[str, Counter[str]] = field(default_factory=dict)
    """By backend id: answers by status."""
    _failing: dict[str, list[CloudError]] = field(default_factory=dict)
    _lost: Counter[str] = field(default_factory=Counter)
    _now: dict[str, Told] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    # -- knobs

    def fail(self, method: str, *errors: CloudError) -> None:
        """The next calls of ``method`` fail with these, one each, and do nothing."""
        self._failing.setdefault(method, []).extend(errors)

    def lose_answers(self, method: str, times: int = 1) -> None:
        """The next calls do their work and then fail as a broken connection does."""
        self._lost[method] += times

    # -- what tests look at

    def backends(self, service_id: str) -> list[Backend]:
        """Of now."""
        told = self._now.get(service_id)
        return told.backends if told is not None else []

    def shares(self, service_id: str) -> dict[str, float]:
        told = self._now.get(service_id)
        return told.shares if told is not None else {}

    def shares_over_time(self, service_id: str, version_id: str) -> list[float]:
        """Percent of one version, each change once."""
        found = [0.0]
        for told in list(self.history):
            if told.service_id == service_id and (share := told.shares.get(version_id, 0.0)) != found[-1]:
                found.append(share)
        return found

    def had_traffic(self, cluster_id: str) -> bool:
        return any(b.id == cluster_id and b.weight for told in list(self.history) for b in told.backends)

    def power_off(self, agent: FakeAgent) -> None:
        """The fleet's hook: a head goes dark."""
        if not agent.is_head:
            return
        for service_id, told in list(self._now.items()):
            if {service_id, agent.cluster_id} & self.forgiven:
                continue
            if any(b.id == agent.cluster_id and b.weight for b in told.backends):
                self.wrongs.append(f"{agent.cluster_id} was ended while it had traffic: {told.backends}")
            elif (
                any(h.service_id == service_id for h in self.history)
                and self.had_traffic(agent.cluster_id)
                and not agent.serve.drained
            ):
                self.wrongs.append(f"{agent.cluster_id} was ended without a drain")

    # -- the protocol

    def ensure(self, spec: EndpointSpec) -> Endpoint:
        with self._call("ensure"):
            old = self.specs.get(spec.service_id)
            if old is not None and old.model_copy(update={"grpc": spec.grpc}) != spec:
                self.wrongs.append(f"another spec of the same endpoint: {spec}, before {old}")
            self.specs[spec.service_id] = spec
            return self._endpoint(spec.service_id)

    def set_backends(self, service_id: str, revision: int, backends: list[Backend]) -> None:
        with self._call("set_backends"):
            if service_id not in self.specs:
                raise Gone(f"There is no endpoint of {service_id}.", resource=service_id)
            last = self._now.get(service_id)
            if last is not None and revision <= last.revision:
                if revision == last.revision and backends != last.backends:
                    self.wrongs.append(f"revision {revision} of {service_id} says two things")
                return
            told = Told(service_id, revision, list(backends))
            self._check(told, last)
            self._now[service_id] = told
            self.history.append(told)

    def counters(self, service_id: str) -> list[BackendCounters]:
        with self._call("counters"):
            if service_id not in self.specs:
                raise Gone(f"There is no endpoint of {service_id}.", resource=service_id)
            return [
                BackendCounters(
                    backend_id=b.id, version_id=b.version_id, requests=dict(self.requests.get(b.id, Counter()))
                )
                for b in self.backends(service_id)
            ]

    def describe(self, service_id: str) -> Endpoint | None:
        return self._endpoint(service_id) if service_id in self.specs else None

    def remove(self, service_id: str) -> None:
        with self._call("remove"):
            self.specs.pop(service_id, None)
            self._now.pop(service_id, None)

    def list_owned(self, installation_id: str) -> list[str]:
        return [s for s, spec in list(self.specs.items()) if spec.installation_id == installation_id]

    # -- inside

    def _endpoint(self, service_id: str) -> Endpoint:
        return Endpoint(service_id=service_id, url=f"http://{service_id}.test")

    def _call(self, method: str) -> _Call:
        return _Call(self, method)

    def _check(self, told: Told, last: Told | None) -> None:
        if told.service_id in self.forgiven:
            return
        for backend in told.backends:
            head = self.fleet.heads.get(backend.id)
            if backend.weight and head is not None and not head.serve.probed:
                self.wrongs.append(f"{backend.id} got traffic though no real request to it was ever answered")
        for version_id in {b.version_id for b in told.backends}:
            if len({b.weight for b in told.backends if b.version_id == version_id and b.weight}) > 1:
                self.wrongs.append(f"two weights of one version: {told.backends}")
        ids = [b.id for b in told.backends]
        if len(set(ids)) != len(ids):
            self.wrongs.append(f"a backend stands there twice: {told.backends}")
        if last is not None and last.shares and not told.shares:
            up = [b.id for b in last.backends if b.weight and b.id in self.fleet.heads]
            if [b for b in up if b not in self.forgiven]:
                self.wrongs.append(f"nobody has traffic any more, though {', '.join(up)} had it and runs")


class _Call:
    """One call: counted, slow, failing or unanswered as the knobs say."""

    def __init__(self, balancer: WatchedBalancer, method: str) -> None:
        self.balancer, self.method = balancer, method

    def __enter__(self) -> None:
        b = self.balancer
        time.sleep(b.latency_s)
        b._lock.acquire()
        b.calls[self.method] += 1
        failing = b._failing.get(self.method)
        if failing:
            b._lock.release()
            raise failing.pop(0)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        b = self.balancer
        lost = kind is None and b._lost[self.method] > 0
        if lost:
            b._lost[self.method] -= 1
        b._lock.release()
        if lost:
            raise CloudError(f"The answer to {self.method} was lost.", remedy="Ask again.")
