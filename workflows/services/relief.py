"""ServiceWorkflow, third part: a head's machine that its cloud will take back (host maintenance, spot).

Two heads of one cluster must never live at once, so a cluster can replace its head only when that is gone, and nobody
would answer meanwhile. A service makes before it breaks: another cluster of the same version (a *relief*) comes up
beside the one that was announced, is given the version, and is probed like any other. Only then the two change
places: the relief becomes one of the version's clusters and gets its share, the other leaves the load balancer, is
drained and released. Until then the version, and a rollout beside it, go on with the clusters that they have.
"""

from __future__ import annotations

from functools import partial

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.common import EventLevel
    from heliostat.models.services import ServiceVersionState
    from workflows import policies
    from workflows.services.state import LIVING, RolloutKind, Slot, VersionData
    from workflows.services.versions import GATES, NOTICES, ServiceClusters, task_of


class ServiceNotices(ServiceClusters):
    def _tend_notices(self) -> None:
        for version in self.s.versions.values():
            if version.state not in LIVING:
                continue  # it goes, with all that it has
            for relief in list(version.relief):
                self._check_relief(version, relief)
            if self._may_relieve(version) and self.s.weights.get(version.spec.id):
                for slot in version.slots:
                    if slot.notice and slot.open and workflow.patched(NOTICES):
                        self._begin_relief(version, slot)

    def _may_relieve(self, version: VersionData) -> bool:
        """Not while the version is itself being rolled out, or its clusters are being given to another one, or where
        nothing extra may exist: what is announced then still is so when the rollout is over."""
        r = self.s.rollout
        if version.state != ServiceVersionState.RUNNING or version.capacity is not None:
            return False
        return r is None or (r.kind == RolloutKind.STEPS and r.surge == 100 and version.spec.id not in r.version_ids)

    def _begin_relief(self, version: VersionData, slot: Slot) -> None:
        if any(relief.relieves == slot.number for relief in version.relief):
            return
        taken = {s.number for s in version.held}
        number = next(n for n in range(1, len(taken) + 2) if n not in taken)
        version.relief.append(Slot(number=number, relieves=slot.number))
        self._event(
            "relief", f"{version.spec.name}: cluster {number} starts, to take the place of cluster {slot.number}"
        )
        self._touch(version)

    def _check_relief(self, version: VersionData, relief: Slot) -> None:
        """Takes its slot's place once it is fit, or the slot has no cluster any more; is let go when the slot is well
        again without it, its next head being up, or is not the version's any more."""
        slot = next((s for s in version.slots if s.number == relief.relieves), None)
        well = slot is not None and slot.fit(version.spec.id) and not slot.notice
        if slot is None or (well and not relief.fit(version.spec.id)):
            version.relief.remove(relief)
            self._leave(version, relief)
            self._event("relief", f"{version.spec.name}: cluster {relief.number} is not needed any more")
            self._touch(version)
        elif self._may_relieve(version) and (self._may_answer(version, relief) or not slot.cluster_id):
            version.relief.remove(relief)
            version.slots[version.slots.index(slot)] = relief
            relief.relieves = 0
            self._leave(version, slot)
            self._event(
                "relieved", f"{version.spec.name}: cluster {relief.number} has taken the place of cluster {slot.number}"
            )
            self._touch(version)

    def _may_answer(self, version: VersionData, relief: Slot) -> bool:
        """It is fit, and lets in whom those with traffic let in."""
        return relief.fit(version.spec.id) and (relief.gate == self.s.gate_key or not workflow.patched(GATES))

    def _leave(self, version: VersionData, slot: Slot) -> None:
        slot.given = ""  # no command to it is waited for any more
        version.leaving.append(slot)

    def _tend_leaving(self) -> None:
        for version in self.s.versions.values():
            for slot in version.leaving:
                out = not any(b.id == slot.cluster_id for b in self.s.backends)
                if out or self._ends_since(policies.TERMINATE_UNTOLD):
                    self._start(f"end {task_of(version, slot)}", partial(self._let_go, version, slot))

    async def _let_go(self, version: VersionData, slot: Slot) -> None:
        """As ``_drain_and_release``, of one cluster."""
        if slot.open_on is not None:
            await self._drain(version, slot)
        await workflow.wait_condition(partial(self._is_still, task_of(version, slot)))
        await self._release(version, slot, slot.notice or "it is not needed any more")
        version.leaving.remove(slot)
        self._event("released", f"{version.spec.name}: cluster {slot.number} is released", level=EventLevel.INFO)
        self._touch(version)
