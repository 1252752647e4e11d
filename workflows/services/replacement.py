"""Replacement of a cluster whose head's machine the cloud will take back (host maintenance, spot).

Two heads of one cluster must never live at once, so a cluster can replace its head only when that is gone, and nobody
would answer meanwhile. A service starts first and stops then: a replacement, another cluster of the same version
(``VersionData.relief``), comes up beside the announced one, gets the version's config and is probed like any other.
Only then the two change places: the replacement becomes one of the version's clusters and gets its share; the other
one leaves the load balancer, is drained and released. Until then the version, and a rollout beside it, use the
clusters that they have.
"""

from __future__ import annotations

from functools import partial

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.services import ServiceVersionState
    from workflows import policies
    from workflows.entity.steps import Steps
    from workflows.services.draining import Draining
    from workflows.services.patches import GATES, NOTICES
    from workflows.services.records import ServiceRecords
    from workflows.services.rollout_state import RolloutKind
    from workflows.services.state import LIVING, ServiceData, Slot, VersionData


class Replacement:
    def __init__(self, s: ServiceData, records: ServiceRecords, steps: Steps, draining: Draining) -> None:
        self._s = s
        self._records = records
        self._steps = steps
        self._draining = draining

    def reconcile(self) -> None:
        for version in self._s.versions.values():
            if version.state not in LIVING:
                continue  # it ends, with all that it has
            for replacement in list(version.relief):
                self._reconcile_replacement(version, replacement)
            if self._allowed(version) and self._s.weights.get(version.spec.id):
                for slot in version.slots:
                    if slot.notice and slot.open and workflow.patched(NOTICES):
                        self._start(version, slot)

    def _allowed(self, version: VersionData) -> bool:
        """Not while the version itself is rolled out, or another version takes its clusters over, or no extra capacity
        is allowed. A notice is still valid when the rollout is over."""
        r = self._s.rollout
        if version.state != ServiceVersionState.RUNNING or version.capacity is not None:
            return False
        return r is None or (r.kind == RolloutKind.STEPS and r.surge == 100 and version.spec.id not in r.version_ids)

    def _start(self, version: VersionData, slot: Slot) -> None:
        if any(replacement.relieves == slot.number for replacement in version.relief):
            return
        taken = {s.number for s in version.all_slots}
        number = next(n for n in range(1, len(taken) + 2) if n not in taken)
        version.relief.append(Slot(number=number, relieves=slot.number))
        self._event(version, "relief", f"cluster {number} starts, to replace cluster {slot.number}")

    def _reconcile_replacement(self, version: VersionData, replacement: Slot) -> None:
        """It takes its slot's place once it is fit, or once the slot has no cluster any more. It is released when the
        slot recovers first, with its next head, or no longer belongs to the version."""
        slot = next((s for s in version.slots if s.number == replacement.relieves), None)
        recovered = slot is not None and slot.fit(version.spec.id) and not slot.notice
        if slot is None or (recovered and not replacement.fit(version.spec.id)):
            version.relief.remove(replacement)
            self._retire(version, replacement)
            self._event(version, "relief", f"replacement cluster {replacement.number} is no longer needed")
        elif self._allowed(version) and (self._ready(version, replacement) or not slot.cluster_id):
            version.relief.remove(replacement)
            version.slots[version.slots.index(slot)] = replacement
            replacement.relieves = 0
            self._retire(version, slot)
            self._event(version, "relieved", f"cluster {replacement.number} has replaced cluster {slot.number}")

    def _ready(self, version: VersionData, replacement: Slot) -> bool:
        """It is fit, and its proxies take the same tokens as those with traffic."""
        return replacement.fit(version.spec.id) and (
            replacement.gate == self._s.gate_key or not workflow.patched(GATES)
        )

    def _retire(self, version: VersionData, slot: Slot) -> None:
        slot.given = ""  # abandons the command that it is waiting for
        version.leaving.append(slot)

    def release_replaced(self) -> None:
        for version in self._s.versions.values():
            for slot in version.leaving:
                out = not any(b.id == slot.cluster_id for b in self._s.backends)
                if out or self._draining.terminating_for(policies.TERMINATE_UNTOLD):
                    self._steps.start(f"end {version.step_of(slot)}", partial(self._drain_and_release, version, slot))

    async def _drain_and_release(self, version: VersionData, slot: Slot) -> None:
        if slot.open_on is not None:
            await self._draining.drain(version, slot)
        await self._draining.release(version, slot, slot.notice or "it is no longer needed")
        version.leaving.remove(slot)
        self._event(version, "released", f"cluster {slot.number} is released")

    def _event(self, version: VersionData, kind: str, message: str) -> None:
        self._records.event(kind, f"{version.spec.name}: {message}")
        self._records.touch(version)
