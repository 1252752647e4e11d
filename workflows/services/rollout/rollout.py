"""ServiceWorkflow, fourth part: the passage from one version to the next.

A rollout is one coroutine that is guarded by ``RolloutData`` alone: it may be left at any await (a pause,
continue-as-new) and goes on from what the state says. Traffic moves only to versions that are fit, and every way
out but success ends in ``_go_back``, which gives the weights back first.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.canaries import CanaryActivities, StepVerdict, WatchStep
    from heliostat.models.common import EventLevel
    from heliostat.models.services import ServiceState, ServiceVersionState
    from runtime.messages.services import DeployRequest
    from workflows import policies
    from workflows.services.progress import let_go
    from workflows.services.relief import ServiceNotices
    from workflows.services.state import RolloutData, RolloutKind, Slot, VersionData
    from workflows.services.versions import GATES


RELEASING = "what comes back in place has let go"
"""Patch: of all that it had before. Else it would let go of what it is given as well."""


class ServiceRollouts(ServiceNotices):
    # --- beginning ----------------------------------------------------------------------------------------

    def _begin(self, deploy: DeployRequest, *, back: bool = False) -> None:
        """A deploy becomes the service's rollout. ``back``: to a version that served before."""
        now = workflow.now()
        for spec in deploy.versions:
            version = self.s.versions.get(spec.id)
            if version is None:
                version = self.s.versions[spec.id] = VersionData(spec=spec, state_since=now, reason="deployed")
            self._touch(version)
        weights = {v: w for v, w in deploy.weights.items() if v in self.s.versions}
        if not deploy.versions and not weights:
            # The records called them living after somebody had ended the workflow before this one.
            self._event("refused", "none of these versions is there", level=EventLevel.ERROR, actor=deploy.actor)
            return
        first = self.s.versions[deploy.versions[0].id if deploy.versions else next(iter(weights))]
        rules = first.spec.rollout
        base = {v: w for v, w in self.s.weights.items() if w}
        in_place = deploy.in_place and len(base) == 1
        if deploy.in_place and not in_place:
            why = "nothing serves any more" if not base else "several versions serve"
            self._event("not_in_place", f"{why}: the new version gets clusters of its own", actor=deploy.actor)
        kind = RolloutKind.WEIGHTS if weights else RolloutKind.IN_PLACE if in_place else RolloutKind.STEPS
        stop_at = deploy.canary_percent
        self.s.rollout = RolloutData(
            kind=kind,
            deploy_id=deploy.id,
            actor=deploy.actor,
            version_ids=list(weights) or [v.id for v in deploy.versions],
            base=base,
            target=weights,
            # The first version has nobody to be compared with, one that comes back has shown itself.
            steps=[100] if back or not base else rules.steps,
            stop_at=stop_at if base and stop_at is not None and stop_at < 100 else None,
            surge=deploy.max_surge_percent if base and kind == RolloutKind.STEPS else 100,
            back=back,
            since=now,
            health_deadline=now + timedelta(seconds=rules.health_timeout_s),
            deadline=now + timedelta(seconds=rules.timeout_s),
        )
        names = ", ".join(self.s.versions[v].spec.name for v in self.s.rollout.version_ids)
        what = {
            RolloutKind.STEPS: "rollout of",
            RolloutKind.IN_PLACE: "update in place to",
            RolloutKind.WEIGHTS: "weights of",
        }
        self._event("rollout", f"{'rollback: ' if back else ''}{what[kind]} {names}", actor=deploy.actor)
        if not base:
            self._enter(ServiceState.STARTING, f"{names} starts")
        elif back:
            self._enter(ServiceState.ROLLING_BACK, f"back to {names}")
        else:
            busy = ServiceState.ROLLING_OUT if kind == RolloutKind.STEPS else ServiceState.UPDATING
            self._enter(busy, f"{what[kind]} {names}")
        self._wake()

    def _revive(self, version: VersionData) -> None:
        """It is to have clusters (again)."""
        if version.state == ServiceVersionState.TERMINATING:
            version.recalled = True
        version.ended_at = version.kept_until = None
        if version.state == ServiceVersionState.UNHEALTHY:
            for slot in version.slots:
                if slot.failed:  # what it was kept for counts no more: it is given its config again
                    slot.given = ""
                    slot.forgive()
        if version.state != ServiceVersionState.RUNNING:
            self._enter_version(version, ServiceVersionState.STARTING, "its clusters start")
        if not version.slots:
            version.slots = [Slot(number=n + 1) for n in range(version.spec.cluster_replicas)]
        self._touch(version)

    # --- the passage --------------------------------------------------------------------------------------

    async def _roll(self) -> None:
        """Until it is done, has gone back, or is paused."""
        r = self.s.rollout
        assert r is not None
        if not r.end:
            match r.kind:
                case RolloutKind.STEPS:
                    await self._by_steps(r)
                case RolloutKind.IN_PLACE:
                    await self._in_place(r)
                case RolloutKind.WEIGHTS:
                    await self._by_weights(r)
        if r.end and self.s.terminate is None:
            await self._go_back(r)

    def _off(self, r: RolloutData) -> bool:
        """It is not to go on."""
        return bool(r.end) or r.paused or self.s.terminate is not None

    async def _until(self, r: RolloutData, done: Callable[[], bool], deadline: datetime, late: str) -> bool:
        """Waits; False: the rollout is off, by ``late`` if ``deadline`` passed."""
        left = deadline - workflow.now()
        if left <= timedelta(0) and not done():
            self._end_rollout(r, late, failed=True)
            return False
        try:
            await workflow.wait_condition(lambda: done() or self._off(r), timeout=left, timeout_summary=late)
        except TimeoutError:
            self._end_rollout(r, late, failed=True)
            return False
        return not self._off(r)

    def _end_rollout(self, r: RolloutData, reason: str, *, failed: bool = False) -> None:
        if not r.end:
            r.end, r.failed, r.paused = reason, failed, False
            self._wake()

    async def _have_fit(self, r: RolloutData, version: VersionData) -> bool:
        """Its clusters, Serve on them and real requests to them. Returns False when it is off."""
        if version.releasing:  # too late to recall what a deploy before this one has let go
            await workflow.wait_condition(lambda: version.state == ServiceVersionState.TERMINATED)
        if not version.fit or version.state not in (ServiceVersionState.STARTING, ServiceVersionState.RUNNING):
            if r.surge < 100 and version.capacity is None:
                version.capacity = max(r.surge, 1)
            self._revive(version)
        waits = f"{version.spec.name} not fit for traffic within {version.spec.rollout.health_timeout_s:g} s"
        by_gates = workflow.patched(GATES)

        def fit() -> bool:
            return version.fit and (not by_gates or all(slot.gate == self.s.gate_key for slot in version.slots))

        ok = await self._until(r, lambda: fit() or bool(version.failure), r.health_deadline, waits)
        if ok and version.failure and not version.fit:
            self._end_rollout(r, f"{version.spec.name}: {version.failure}", failed=True)
            return False
        return ok

    async def _weigh(self, r: RolloutData, weights: dict[str, int]) -> bool:
        """Gives the load balancer new weights and waits until it goes by them."""
        self.s.weights = weights
        for version_id in weights:
            self._touch(self.s.versions[version_id])
        return await self._until(
            r, lambda: self.s.applied(weights), r.deadline, "the load balancer did not take the weights in time"
        )

    async def _by_steps(self, r: RolloutData) -> None:
        version = self.s.versions[r.version_id]
        if not await self._have_fit(r, version):
            return
        while True:
            if 0 < r.percent < 100 and not r.held:
                r.doing = "holding"
                if r.base and not r.back and not await self._hold(r, version):
                    return
                r.held = True
            step = r.next_step()
            if step is None:
                break
            r.doing = "shifting"
            if not await self._shift(r, version, step):
                return
        if r.percent < 100:
            self._pause(r, f"stops at {r.percent} %, as asked")
            return
        r.doing = "completing"
        self._complete(r, {r.version_id: 100})

    async def _shift(self, r: RolloutData, version: VersionData, step: int) -> bool:
        """To ``step`` percent; where little extra capacity may exist, in rounds in which the old ones give theirs."""
        while r.percent < step:
            share = step
            if r.surge < 100:
                old = 100 - r.percent
                room = min(100, 100 + r.surge - old)
                if room <= r.percent:  # nothing extra at all: the old ones give first, a little at a time
                    room = min(step, r.percent + policies.GIVE_PERCENT)
                    old = 100 - room
                for v in r.base:
                    self.s.versions[v].capacity = max(old, 1) if old < 100 else None
                if not await self._capacities_move(r, version):  # the old ones first: never more than may exist
                    return False
                version.capacity = room if room < 100 else None
                if not await self._capacities_move(r, version):
                    return False
                share = min(step, room)
            r.percent, r.held = share, False
            if not await self._weigh(r, r.weights()):
                return False
            self._event("step", f"{version.spec.name} has {share} % of the traffic", actor=r.actor)
        return True

    async def _capacities_move(self, r: RolloutData, version: VersionData) -> bool:
        """Until all have what they are to have. False: it is off."""
        self._wake()  # for the main loop to give them
        ok = await self._until(
            r,
            lambda: self._capacities_taken(r) or bool(version.failure),
            r.deadline,
            "capacity did not move in time",
        )
        if ok and version.failure:
            self._end_rollout(r, f"{version.spec.name}: {version.failure}", failed=True)
            return False
        return ok

    def _capacities_taken(self, r: RolloutData) -> bool:
        new = self.s.versions[r.version_id]
        # Of the old ones what answers: a head that is lost has given all it had.
        old = [(v, s) for v in (self.s.versions[i] for i in r.base) for s in v.slots if s.open]
        return all(
            s.healthy and s.probed == s.wanted(v.spec.id, v.capacity) for v, s in (*((new, s) for s in new.slots), *old)
        )

    async def _hold(self, r: RolloutData, version: VersionData) -> bool:
        """Holds a step and watches the canary against the running versions. False: it is off."""
        rules = version.spec.rollout
        hold = timedelta(seconds=rules.hold_s)
        r.holds_until = workflow.now() + hold
        self._dirty = True
        self._wake()
        watch = self._watch(r, version, hold)
        try:
            ok = await self._until(
                r,
                lambda: watch.done() or not version.fit or r.skip,
                r.deadline,
                f"not complete within {rules.timeout_s:g} s",
            )
            if not ok:
                return False
            if r.skip:
                r.skip = False
                return True
            return await self._good(r, version, watch, version.fit)
        finally:
            let_go(watch)
            r.holds_until = None

    def _watch(
        self, r: RolloutData, version: VersionData, hold: timedelta, window_s: float | None = None
    ) -> workflow.ActivityHandle[StepVerdict]:
        return workflow.start_activity_method(
            CanaryActivities.watch_canary,
            WatchStep(
                canary=[s.cluster_id for s in version.slots],
                running=[s.cluster_id for v in r.base for s in self.s.versions[v].slots if s.open],
                rules=version.spec.rollout,
                hold_s=hold.total_seconds(),
                window_s=window_s,
            ),
            summary=f"watch {version.spec.name} at {r.percent} % for {hold.total_seconds():g} s",
            start_to_close_timeout=hold + policies.WATCH_BEYOND,
            schedule_to_close_timeout=hold + policies.WATCH_BEYOND,
            cancellation_type=workflow.ActivityCancellationType.TRY_CANCEL,
            **policies.WATCH,
        )

    async def _good(
        self, r: RolloutData, version: VersionData, watch: workflow.ActivityHandle[StepVerdict], healthy: bool
    ) -> bool:
        """The verdict on a canary whose watch is over, or which is not healthy. False: the rollout ends by it."""
        if not healthy:
            why = version.failure or next(
                (s.message or s.reason for s in version.slots if not s.fit(version.spec.id)), ""
            )
            self._end_rollout(r, f"{version.spec.name} is not healthy at {r.percent} %: {why}", failed=True)
            return False
        verdict = await watch
        r.observed = verdict.observed
        self._dirty = True
        if verdict.breach:
            self._event("breach", f"{version.spec.name} at {r.percent} %: {verdict.breach}", level=EventLevel.WARNING)
            self._end_rollout(r, f"{version.spec.name} at {r.percent} %: {verdict.breach}", failed=True)
            return False
        return True

    async def _watch_beside(self, r: RolloutData) -> None:
        """The canary while no step is held: it waits for a person, or capacity moves. People's requests go to it then
        too, and it goes back as at any step."""
        version = self.s.versions[r.version_id]
        watch = self._watch(r, version, policies.PAUSED_WATCH, policies.PAUSED_WINDOW_S)
        try:
            await workflow.wait_condition(
                lambda: watch.done() or not version.serves or not r.beside or self.s.terminate is not None
            )
            if r.beside and self.s.terminate is None:
                await self._good(r, version, watch, version.serves)
        finally:
            let_go(watch)

    async def _by_weights(self, r: RolloutData) -> None:
        wanted = {v: w for v, w in r.target.items() if w}
        for version_id in wanted:
            if not await self._have_fit(r, self.s.versions[version_id]):
                return
        r.doing = "shifting"
        if await self._weigh(r, wanted):
            self._complete(r, wanted)

    async def _in_place(self, r: RolloutData) -> None:
        """One cluster after the other; the replicas of the old config answer until those of the new one do."""
        new = self.s.versions[r.version_id]
        old = self.s.versions[next(iter(r.base))]
        if new.releasing and workflow.patched(RELEASING):  # a cluster that was relieved: what it gets now would go too
            await workflow.wait_condition(lambda: not new.releasing)
        new.ended_at = new.kept_until = None
        self._enter_version(new, ServiceVersionState.UPDATING, f"in place of {old.spec.name}")
        while True:
            r.doing = "shifting"
            if new.slots and not await self._have_fit_in_place(r, new):
                return
            if not old.slots:
                break
            new.slots.append(old.slots.pop(0))
            new.slots[-1].forgive()
            new.capacity = old.capacity
            total = len(new.slots) + len(old.slots)
            r.percent = round(100 * len(new.slots) / total)
            self.s.weights = {v: w for v, w in {old.spec.id: 100 - r.percent, new.spec.id: r.percent}.items() if w}
            self._touch(old)
            self._touch(new)
        old.replaced_by = new.spec.id
        r.doing = "completing"
        if await self._until(
            r, lambda: self.s.applied(self.s.weights), r.deadline, "the load balancer was not told in time"
        ):
            self._complete(r, {new.spec.id: 100})

    async def _have_fit_in_place(self, r: RolloutData, new: VersionData) -> bool:
        waits = f"{new.spec.name} not fit for traffic within {new.spec.rollout.health_timeout_s:g} s"
        ok = await self._until(r, lambda: new.fit or bool(new.failure), r.health_deadline, waits)
        if ok and not new.fit:
            self._end_rollout(r, f"{new.spec.name}: {new.failure}", failed=True)
            return False
        return ok

    # --- ending -------------------------------------------------------------------------------------------

    def _complete(self, r: RolloutData, weights: dict[str, int]) -> None:
        """The new versions serve; what has no weight any more is drained."""
        new = self.s.versions[max(weights, key=lambda v: weights[v])]
        self.s.weights = weights
        for version_id in weights:
            version = self.s.versions[version_id]
            version.capacity, version.replaced_by = None, ""
            self._enter_version(version, ServiceVersionState.RUNNING, "serves")
        gave = {v: w for v, w in r.base.items() if v not in weights and v in self.s.versions}
        if gave:
            self.s.previous = max(gave, key=lambda v: gave[v])
        self.s.primary = new.spec.id
        for version in self.s.versions.values():
            if version.spec.id in weights or version.state == ServiceVersionState.UNHEALTHY:
                continue
            how = "in place " if version.replaced_by == new.spec.id else ""
            self._retire(version, f"replaced {how}by {new.spec.name}")
        self.s.rollout = None
        took = (workflow.now() - r.since).total_seconds()
        self._event("rollout_done", f"{new.spec.name} serves; the rollout took {took:.0f} s", actor=r.actor)
        self._enter(ServiceState.RUNNING, f"{new.spec.name} serves")
        self._wake()

    async def _go_back(self, r: RolloutData) -> None:
        """Undo of a rollout: the weights first, then the rest."""
        new = self.s.versions[r.version_id]
        r.doing = "going back"
        if r.base:
            self._enter(ServiceState.ROLLING_BACK, r.end)
        if r.kind == RolloutKind.IN_PLACE:
            await self._put_back(r, new)
            if self.s.terminate is not None:
                return
        self.s.weights = dict(r.base)
        self._dirty = True
        self._wake()
        if r.base:  # nobody's traffic waits for a first version to be taken out
            await workflow.wait_condition(lambda: self.s.applied(self.s.weights) or self.s.terminate is not None)
        if self.s.terminate is not None:
            return
        for version_id in r.base:
            self.s.versions[version_id].capacity = None
        self._event("rolled_back", r.end, level=EventLevel.WARNING, actor=r.actor)
        for version_id in r.version_ids:
            version = self.s.versions[version_id]
            if version_id in r.base or version.ended_at is not None:
                continue
            if r.failed:
                version.kept_until = workflow.now() + timedelta(seconds=version.spec.rollout.keep_failed_s)
                self._enter_version(version, ServiceVersionState.UNHEALTHY, r.end)
            else:
                self._retire(version, r.end)
        self.s.rollout = None
        if r.base:
            self._enter(ServiceState.RUNNING, f"{self._name(self.s.primary)} serves; {r.end}")
        else:
            self._enter(ServiceState.UNHEALTHY, r.end)
        self._wake()

    async def _put_back(self, r: RolloutData, new: VersionData) -> None:
        """The clusters get the config before again; its good replicas were never taken down."""
        old = self.s.versions[next(iter(r.base))]
        for slot in new.slots:
            slot.forgive()
        old.slots = sorted([*new.slots, *old.slots], key=lambda s: s.number)
        new.slots = []
        self.s.weights = dict(r.base)  # with the slots: in between the proxies would have no share of anything
        self._enter_version(old, ServiceVersionState.RUNNING, "its config is put back")
        limit = timedelta(seconds=old.spec.rollout.health_timeout_s)
        try:
            await workflow.wait_condition(
                lambda: old.fit or self.s.terminate is not None, timeout=limit, timeout_summary="the config put back"
            )
        except TimeoutError:
            self._event("put_back", f"{old.spec.name} is not healthy again yet", level=EventLevel.ERROR)

    def _pause(self, r: RolloutData, why: str, actor: str = "") -> None:
        if not r.paused:
            r.paused, r.paused_at = True, workflow.now()
            self._event("rollout_paused", f"at {r.percent} %: {why}", actor=actor or r.actor)
            self._wake()

    def _unpause(self, r: RolloutData) -> None:
        r.resume(workflow.now())
        self._wake()

    def _name(self, version_id: str | None) -> str:
        return self.s.versions[version_id].spec.name if version_id in self.s.versions else "nothing"
