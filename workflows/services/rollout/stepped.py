"""A rollout by steps: new clusters, a growing share of the traffic, a hold with a canary at each step."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from workflows import policies
    from workflows.entity.alarm import Wakeup
    from workflows.services.records import ServiceRecords
    from workflows.services.rollout.canary import Canary
    from workflows.services.rollout.transition import Transition
    from workflows.services.rollout_state import RolloutData
    from workflows.services.state import ServiceData, VersionData


class SteppedRollout:
    def __init__(
        self, s: ServiceData, records: ServiceRecords, wake: Wakeup, transition: Transition, canary: Canary
    ) -> None:
        self._s = s
        self._records = records
        self._wake = wake
        self._transition = transition
        self._canary = canary

    async def run(self, r: RolloutData) -> None:
        version = self._s.versions[r.version_id]
        if not await self._transition.wait_fit(r, version):
            return
        while True:
            if 0 < r.percent < 100 and not r.held:
                r.doing = "holding"
                if r.base and not r.back and not await self._canary.hold(r, version):
                    return
                r.held = True
            step = r.next_step()
            if step is None:
                break
            r.doing = "shifting"
            if not await self._shift(r, version, step):
                return
        if r.percent < 100:
            self._transition.pause(r, "the requested share is reached")
            return
        r.doing = "completing"
        self._transition.complete(r, {r.version_id: 100})

    async def _shift(self, r: RolloutData, version: VersionData, step: int) -> bool:
        """To ``step`` percent. With little extra capacity (``surge``), in rounds: the old versions give capacity first,
        then the new one takes it."""
        while r.percent < step:
            share = step
            if r.surge < 100:
                old = 100 - r.percent
                room = min(100, 100 + r.surge - old)
                if room <= r.percent:  # no extra capacity at all: the old versions give first, a little at a time
                    room = min(step, r.percent + policies.GIVE_PERCENT)
                    old = 100 - room
                for v in r.base:
                    self._s.versions[v].capacity = max(old, 1) if old < 100 else None
                if not await self._wait_capacities(r, version):
                    return False
                version.capacity = room if room < 100 else None
                if not await self._wait_capacities(r, version):
                    return False
                share = min(step, room)
            r.percent, r.held = share, False
            if not await self._transition.set_weights(r, r.weights()):
                return False
            self._records.event("step", f"{version.spec.name} has {share} % of the traffic", actor=r.actor)
        return True

    async def _wait_capacities(self, r: RolloutData, version: VersionData) -> bool:
        """Until all clusters have their target capacity. False: the rollout is to stop."""
        self._wake()  # the main loop gives it to them
        ok = await self._transition.wait(
            r,
            lambda: self._capacities_applied(r) or bool(version.failure),
            r.deadline,
            "the clusters did not reach their target capacity in time",
        )
        if ok and version.failure:
            self._transition.end(r, f"{version.spec.name}: {version.failure}", failed=True)
            return False
        return ok

    def _capacities_applied(self, r: RolloutData) -> bool:
        new = self._s.versions[r.version_id]
        # Of the old clusters only those that answer: a lost head has given all its capacity.
        old = [(v, s) for v in (self._s.versions[i] for i in r.base) for s in v.slots if s.open]
        return all(
            s.healthy and s.probed == s.wanted(v.spec.id, v.capacity) for v, s in (*((new, s) for s in new.slots), *old)
        )
