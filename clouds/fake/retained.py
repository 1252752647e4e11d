"""What heads keep on the cloud in memory (``clouds.fake.machines``): as on AWS, it is of a zone, and made
before the machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from clouds.contract.errors import Gone, NotOffered
from clouds.contract.machines import MachineSpec, MachineState
from heliostat.errors import CloudError


@dataclass
class FakeRetained:
    """In one zone."""

    made_at: datetime
    volume: str | None
    ip: str | None
    holders: list[str] = field(default_factory=list)
    """Machines that it was handed over to."""

    @property
    def holder(self) -> str | None:
        return self.holders[-1] if self.holders else None


@dataclass
class FakeRetainedStore:
    """``state``: of a machine by its id. Not safe from several threads: its owner has a lock."""

    state: Callable[[str], MachineState]
    held: dict[str, dict[str, FakeRetained]] = field(default_factory=dict)
    """By cluster, then by zone; several of one cluster until one is handed over."""
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def prepare(self, spec: MachineSpec, zones: list[str], now: datetime) -> FakeRetained | None:
        """What that head is launched with."""
        keep = spec.keep
        if keep is None:
            return None
        here = self.held.setdefault(spec.cluster_id, {})
        if keep.had and not here:
            raise CloudError(f"The retained resources of {spec.cluster_id} no longer exist.")
        zone = spec.zone or next(iter([*here, *zones]))
        if keep.had and zone not in here:
            raise NotOffered(
                f"The head cannot be in zone {zone}: its retained resources are in {', '.join(here)}.",
                remedy="Use that zone.",
                resource=spec.node_id,
            )
        if zone not in here:
            number = next(self._numbers)
            volume = f"vol-{number}" if keep.volume_gib else None
            here[zone] = FakeRetained(now, volume, f"10.255.0.{number}" if keep.address else None)
        return here[zone]

    def attach(self, spec: MachineSpec, machine_id: str) -> None:
        here = self.held.get(spec.cluster_id, {})
        if not here:
            return
        if self.state(machine_id) in (MachineState.STOPPING, MachineState.GONE):
            raise Gone(f"Machine {machine_id} has ended.")
        if self.state(machine_id) is MachineState.PENDING:
            raise CloudError(f"Machine {machine_id} does not run yet.", remedy="Try again.")
        zone = spec.zone or next(iter(here))
        retained = here[zone]
        if retained.holder != machine_id:
            self._must_be_free(retained)
            retained.holders.append(machine_id)
        self.held[spec.cluster_id] = {zone: retained}

    def release(self, cluster_id: str) -> None:
        for retained in self.held.get(cluster_id, {}).values():
            self._must_be_free(retained)
        self.held.pop(cluster_id, None)

    def clear(self, before: datetime, lives: Callable[[str], bool]) -> list[str]:
        gone = []
        for cluster_id, here in list(self.held.items()):
            old = all(k.made_at < before and self._is_free(k) for k in here.values())
            if old and not lives(cluster_id):
                gone += [k.volume or k.ip or "" for k in self.held.pop(cluster_id).values()]
        return gone

    def _is_free(self, retained: FakeRetained) -> bool:
        return retained.holder is None or self.state(retained.holder) is MachineState.GONE

    def _must_be_free(self, retained: FakeRetained) -> None:
        if not self._is_free(retained):
            raise CloudError(f"{retained.volume or retained.ip} is still with {retained.holder}.", remedy="Try again.")
