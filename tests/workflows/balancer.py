"""The load balancer in memory, watched: it notes what it was told that would have cost somebody a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clouds.contract.balancer import Backend
from clouds.fake.balancer import FakeBalancer

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


@dataclass(kw_only=True)
class WatchedBalancer(FakeBalancer):
    fleet: FakeFleet
    wrongs: list[str] = field(default_factory=list)
    """What would have cost requests: a test's world ends with none."""
    forgiven: set[str] = field(default_factory=set)
    """Clusters and services whose ends the test itself brought about: they are not held against the workflow."""

    # -- what tests look at; from the event loop, so without the latency and the knobs of a call

    def services(self) -> list[str]:
        """Those that have an endpoint."""
        return list(self._endpoints)

    def url_of(self, service_id: str) -> str | None:
        held = self._endpoints.get(service_id)
        return None if held is None else self._endpoint(held).url

    def backends(self, service_id: str) -> list[Backend]:
        """Of now."""
        held = self._endpoints.get(service_id)
        return [] if held is None else held.backends

    def shares(self, service_id: str) -> dict[str, float]:
        return Told(service_id, 0, self.backends(service_id)).shares

    def shares_over_time(self, service_id: str, version_id: str) -> list[float]:
        """Percent of one version, each change once."""
        found = [0.0]
        for told in (Told(*a) for a in list(self.applied) if a[0] == service_id):
            if (share := told.shares.get(version_id, 0.0)) != found[-1]:
                found.append(share)
        return found

    def had_traffic(self, cluster_id: str) -> bool:
        return any(b.id == cluster_id and b.weight for _, _, backends in list(self.applied) for b in backends)

    # -- what is held against the workflow

    def set_backends(self, service_id: str, revision: int, backends: list[Backend]) -> None:
        with self._lock:
            held, number = self._endpoints.get(service_id), len(self.applied)
            last = Told(service_id, held.revision, held.backends) if held is not None else None
            try:
                super().set_backends(service_id, revision, backends)
            finally:
                if len(self.applied) > number:
                    self._check(Told(*self.applied[-1]), last)
                elif last is not None and revision == last.revision and backends != last.backends:
                    self.wrongs.append(f"revision {revision} of {service_id} says two things")

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

    def power_off(self, agent: FakeAgent) -> None:
        """The fleet's hook: a machine goes dark."""
        if not agent.is_head:
            return
        for service_id in self.services():
            if {service_id, agent.cluster_id} & self.forgiven:
                continue
            if any(b.id == agent.cluster_id and b.weight for b in self.backends(service_id)):
                self.wrongs.append(f"{agent.cluster_id} was ended while it had traffic")
            elif (
                any(a[0] == service_id and any(b.id == agent.cluster_id for b in a[2]) for a in list(self.applied))
                and self.had_traffic(agent.cluster_id)
                and not agent.serve.drained
            ):
                self.wrongs.append(f"{agent.cluster_id} was ended without a drain")
