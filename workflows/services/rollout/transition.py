"""What all kinds of rollouts are made of: wait for fit clusters, set weights, complete, pause, end.

A wait ends as soon as the rollout is to stop (an end, a pause, a terminate), or fails it at its deadline. It then
returns False, and the rollout's coroutine returns; ``RolloutData`` says where it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.services import ServiceState, ServiceVersionState
    from workflows.entity.alarm import Wakeup
    from workflows.services.draining import Draining
    from workflows.services.patches import GATES
    from workflows.services.records import ServiceRecords
    from workflows.services.rollout_state import RolloutData
    from workflows.services.state import ServiceData, Slot, VersionData

NOT_APPLIED = "the load balancer did not apply the weights in time"


def not_ready_in_time(version: VersionData) -> str:
    return f"{version.spec.name} was not ready for traffic within {version.spec.rollout.health_timeout_s:g} s"


class Transition:
    def __init__(self, s: ServiceData, records: ServiceRecords, wake: Wakeup, draining: Draining) -> None:
        self._s = s
        self._records = records
        self._wake = wake
        self._draining = draining

    async def wait(self, r: RolloutData, done: Callable[[], bool], deadline: datetime, late: str) -> bool:
        """False: the rollout is to stop; by ``late`` if ``deadline`` has passed."""

        def stopped() -> bool:
            return bool(r.end) or r.paused or self._s.terminate is not None

        left = deadline - workflow.now()
        if left <= timedelta(0) and not done():
            self.end(r, late, failed=True)
            return False
        try:
            await workflow.wait_condition(lambda: done() or stopped(), timeout=left, timeout_summary=late)
        except TimeoutError:
            self.end(r, late, failed=True)
            return False
        return not stopped()

    async def wait_fit(self, r: RolloutData, version: VersionData) -> bool:
        """Starts the version's clusters where they are missing, and waits until real requests to it are answered."""
        if version.releasing:  # too late to recall what an earlier rollout has retired
            await workflow.wait_condition(lambda: version.state == ServiceVersionState.TERMINATED)
        if not version.fit or version.state not in (ServiceVersionState.STARTING, ServiceVersionState.RUNNING):
            if r.surge < 100 and version.capacity is None:
                version.capacity = max(r.surge, 1)
            self._revive(version)
        by_gates = workflow.patched(GATES)

        def fit() -> bool:
            return version.fit and (not by_gates or all(slot.gate == self._s.gate_key for slot in version.slots))

        late = not_ready_in_time(version)
        ok = await self.wait(r, lambda: fit() or bool(version.failure), r.health_deadline, late)
        if ok and version.failure and not version.fit:
            self.end(r, f"{version.spec.name}: {version.failure}", failed=True)
            return False
        return ok

    def _revive(self, version: VersionData) -> None:
        """The version gets clusters (again)."""
        if version.state == ServiceVersionState.TERMINATING:
            version.recalled = True
        version.ended_at = version.kept_until = None
        if version.state == ServiceVersionState.UNHEALTHY:
            for slot in version.slots:
                if slot.failed:  # the failure it was retained for counts no more: it gets its config again
                    slot.given = ""
                    slot.clear_failure()
        if version.state != ServiceVersionState.RUNNING:
            self._records.enter_version(version, ServiceVersionState.STARTING, "its clusters start")
        if not version.slots:
            version.slots = [Slot(number=n + 1) for n in range(version.spec.cluster_replicas)]
        self._records.touch(version)

    async def set_weights(self, r: RolloutData, weights: dict[str, int]) -> bool:
        """Waits until the load balancer applies them."""
        self._s.weights = weights
        for version_id in weights:
            self._records.touch(self._s.versions[version_id])
        return await self.wait(r, lambda: self._s.applied(weights), r.deadline, NOT_APPLIED)

    def complete(self, r: RolloutData, weights: dict[str, int]) -> None:
        """The new versions serve; the versions without weight are retired."""
        new = self._s.versions[max(weights, key=lambda v: weights[v])]
        self._s.weights = weights
        for version_id in weights:
            version = self._s.versions[version_id]
            version.capacity, version.replaced_by = None, ""
            self._records.enter_version(version, ServiceVersionState.RUNNING, "serves")
        gave = {v: w for v, w in r.base.items() if v not in weights and v in self._s.versions}
        if gave:
            self._s.previous = max(gave, key=lambda v: gave[v])
        self._s.primary = new.spec.id
        for version in self._s.versions.values():
            if version.spec.id in weights or version.state == ServiceVersionState.UNHEALTHY:
                continue
            how = "in place " if version.replaced_by == new.spec.id else ""
            self._draining.retire(version, f"replaced {how}by {new.spec.name}")
        self._s.rollout = None
        took = (workflow.now() - r.since).total_seconds()
        self._records.event("rollout_done", f"{new.spec.name} serves; the rollout took {took:.0f} s", actor=r.actor)
        self._records.enter(ServiceState.RUNNING, f"{new.spec.name} serves")
        self._wake()

    def end(self, r: RolloutData, reason: str, *, failed: bool = False) -> None:
        """It is rolled back. The first reason counts."""
        if not r.end:
            r.end, r.failed, r.paused = reason, failed, False
            self._wake()

    def pause(self, r: RolloutData, why: str, actor: str = "") -> None:
        if not r.paused:
            r.paused, r.paused_at = True, workflow.now()
            self._records.event("rollout_paused", f"at {r.percent} %: {why}", actor=actor or r.actor)
            self._wake()

    def resume(self, r: RolloutData) -> None:
        r.resume(workflow.now())
        self._wake()
