"""A rollout in place: one cluster after the other gets the new config. The replicas of the old config answer until
those of the new one do."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.common import EventLevel
    from heliostat.models.services import ServiceVersionState
    from workflows.services.patches import RELEASING
    from workflows.services.records import ServiceRecords
    from workflows.services.rollout.transition import NOT_APPLIED, Transition, not_ready_in_time
    from workflows.services.rollout_state import RolloutData
    from workflows.services.state import ServiceData, VersionData


class InPlaceRollout:
    def __init__(self, s: ServiceData, records: ServiceRecords, transition: Transition) -> None:
        self._s = s
        self._records = records
        self._transition = transition

    async def run(self, r: RolloutData) -> None:
        new = self._s.versions[r.version_id]
        old = self._s.versions[next(iter(r.base))]
        if new.releasing and workflow.patched(RELEASING):  # a replaced cluster: what it gets now would go with it
            await workflow.wait_condition(lambda: not new.releasing)
        new.ended_at = new.kept_until = None
        self._records.enter_version(new, ServiceVersionState.UPDATING, f"replaces {old.spec.name} in place")
        while True:
            r.doing = "shifting"
            if new.slots and not await self._wait_fit(r, new):
                return
            if not old.slots:
                break
            new.slots.append(old.slots.pop(0))
            new.slots[-1].clear_failure()
            new.capacity = old.capacity
            total = len(new.slots) + len(old.slots)
            r.percent = round(100 * len(new.slots) / total)
            self._s.weights = {v: w for v, w in {old.spec.id: 100 - r.percent, new.spec.id: r.percent}.items() if w}
            self._records.touch(old)
            self._records.touch(new)
        old.replaced_by = new.spec.id
        r.doing = "completing"
        if await self._transition.wait(r, lambda: self._s.applied(self._s.weights), r.deadline, NOT_APPLIED):
            self._transition.complete(r, {new.spec.id: 100})

    async def _wait_fit(self, r: RolloutData, new: VersionData) -> bool:
        late = not_ready_in_time(new)
        ok = await self._transition.wait(r, lambda: new.fit or bool(new.failure), r.health_deadline, late)
        if ok and not new.fit:
            self._transition.end(r, f"{new.spec.name}: {new.failure}", failed=True)
            return False
        return ok

    async def restore(self, r: RolloutData) -> None:
        """Undo of ``run``: the clusters get the old config again; its healthy replicas were never stopped."""
        new = self._s.versions[r.version_id]
        old = self._s.versions[next(iter(r.base))]
        for slot in new.slots:
            slot.clear_failure()
        old.slots = sorted([*new.slots, *old.slots], key=lambda s: s.number)
        new.slots = []
        self._s.weights = dict(r.base)  # with the slots: in between the proxies would have no share of anything
        self._records.enter_version(old, ServiceVersionState.RUNNING, "its config is restored")
        limit = timedelta(seconds=old.spec.rollout.health_timeout_s)
        try:
            await workflow.wait_condition(
                lambda: old.fit or self._s.terminate is not None,
                timeout=limit,
                timeout_summary="the restored config to be healthy",
            )
        except TimeoutError:
            self._records.event(
                "put_back", f"{old.spec.name} is not healthy after its config was restored", level=EventLevel.ERROR
            )
