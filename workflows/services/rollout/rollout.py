"""A rollout: the service goes from its current versions to those of a deploy, or back.

It is one coroutine that ``RolloutData`` alone guards: it may stop at any await (a pause, continue-as-new) and goes on
from what the state says. Traffic moves only to versions that are fit. Every end but success leads to ``_roll_back``,
which restores the weights first.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.common import EventLevel
    from heliostat.models.services import ServiceState, ServiceVersionState
    from runtime.messages.services import DeployRequest
    from workflows.entity.alarm import Wakeup
    from workflows.entity.steps import Steps
    from workflows.services.draining import Draining
    from workflows.services.records import ServiceRecords
    from workflows.services.rollout.canary import Canary
    from workflows.services.rollout.in_place import InPlaceRollout
    from workflows.services.rollout.stepped import SteppedRollout
    from workflows.services.rollout.transition import Transition
    from workflows.services.rollout_state import RolloutData, RolloutKind
    from workflows.services.state import ServiceData, VersionData

WATCH = "watch the canary"

VERBS = {
    RolloutKind.STEPS: "rollout of",
    RolloutKind.IN_PLACE: "in-place update to",
    RolloutKind.WEIGHTS: "traffic split between",
}


class Rollouts:
    def __init__(
        self,
        s: ServiceData,
        records: ServiceRecords,
        steps: Steps,
        wake: Wakeup,
        draining: Draining,
        transition: Transition,
    ) -> None:
        self._s = s
        self._records = records
        self._steps = steps
        self._wake = wake
        self._draining = draining
        self._transition = transition
        self._canary = Canary(s, records, wake, transition)
        self._stepped = SteppedRollout(s, records, wake, transition, self._canary)
        self._in_place = InPlaceRollout(s, records, transition)

    def begin(self, deploy: DeployRequest, *, back: bool) -> None:
        """A deploy becomes the service's rollout. ``back``: to a version that served before."""
        now = workflow.now()
        for spec in deploy.versions:
            version = self._s.versions.get(spec.id)
            if version is None:
                version = self._s.versions[spec.id] = VersionData(spec=spec, state_since=now, reason="deployed")
            self._records.touch(version)
        weights = {v: w for v, w in deploy.weights.items() if v in self._s.versions}
        if not deploy.versions and not weights:
            # The records called them alive after somebody had ended the workflow before this one.
            self._records.event(
                "refused", "none of these versions exists any more", level=EventLevel.ERROR, actor=deploy.actor
            )
            return
        first = self._s.versions[deploy.versions[0].id if deploy.versions else next(iter(weights))]
        rules = first.spec.rollout
        base = {v: w for v, w in self._s.weights.items() if w}
        in_place = deploy.in_place and len(base) == 1
        if deploy.in_place and not in_place:
            why = "no version serves" if not base else "several versions serve"
            self._records.event("not_in_place", f"{why}: the new version gets its own clusters", actor=deploy.actor)
        kind = RolloutKind.WEIGHTS if weights else RolloutKind.IN_PLACE if in_place else RolloutKind.STEPS
        stop_at = deploy.canary_percent
        self._s.rollout = RolloutData(
            kind=kind,
            deploy_id=deploy.id,
            actor=deploy.actor,
            version_ids=list(weights) or [v.id for v in deploy.versions],
            base=base,
            target=weights,
            # The first version has none to be compared with; one that returns has served before.
            steps=[100] if back or not base else rules.steps,
            stop_at=stop_at if base and stop_at is not None and stop_at < 100 else None,
            surge=deploy.max_surge_percent if base and kind == RolloutKind.STEPS else 100,
            back=back,
            since=now,
            health_deadline=now + timedelta(seconds=rules.health_timeout_s),
            deadline=now + timedelta(seconds=rules.timeout_s),
        )
        names = ", ".join(self._s.versions[v].spec.name for v in self._s.rollout.version_ids)
        what = f"{VERBS[kind]} {names}"
        self._records.event("rollout", f"{'rollback: ' if back else ''}{what}", actor=deploy.actor)
        if not base:
            self._records.enter(ServiceState.STARTING, f"{names} starts")
        elif back:
            self._records.enter(ServiceState.ROLLING_BACK, f"rollback to {names}")
        else:
            busy = ServiceState.ROLLING_OUT if kind == RolloutKind.STEPS else ServiceState.UPDATING
            self._records.enter(busy, what)
        self._wake()

    def reconcile(self) -> None:
        r = self._s.rollout
        if r is None:
            return
        if not r.paused:
            self._steps.start("rollout", self._run)
        if r.watched_in_background:
            self._steps.start(WATCH, partial(self._canary.watch_in_background, r))

    async def _run(self) -> None:
        """Until it has completed, was rolled back, or is paused."""
        r = self._s.rollout
        assert r is not None
        if not r.end:
            match r.kind:
                case RolloutKind.STEPS:
                    await self._stepped.run(r)
                case RolloutKind.IN_PLACE:
                    await self._in_place.run(r)
                case RolloutKind.WEIGHTS:
                    await self._run_weights(r)
        if r.end and self._s.terminate is None:
            await self._roll_back(r)

    async def _run_weights(self, r: RolloutData) -> None:
        wanted = {v: w for v, w in r.target.items() if w}
        for version_id in wanted:
            if not await self._transition.wait_fit(r, self._s.versions[version_id]):
                return
        r.doing = "shifting"
        if await self._transition.set_weights(r, wanted):
            self._transition.complete(r, wanted)

    async def _roll_back(self, r: RolloutData) -> None:
        """Undo of a rollout: the weights first, then the rest."""
        r.doing = "going back"
        if r.base:
            self._records.enter(ServiceState.ROLLING_BACK, r.end)
        if r.kind == RolloutKind.IN_PLACE:
            await self._in_place.restore(r)
            if self._s.terminate is not None:
                return
        self._s.weights = dict(r.base)
        self._records.touch_service()
        self._wake()
        if r.base:  # without a version before, no traffic has to leave the new one first
            await workflow.wait_condition(lambda: self._s.applied(self._s.weights) or self._s.terminate is not None)
        if self._s.terminate is not None:
            return
        for version_id in r.base:
            self._s.versions[version_id].capacity = None
        self._records.event("rolled_back", r.end, level=EventLevel.WARNING, actor=r.actor)
        for version_id in r.version_ids:
            version = self._s.versions[version_id]
            if version_id in r.base or version.ended_at is not None:
                continue
            if r.failed:
                version.kept_until = workflow.now() + timedelta(seconds=version.spec.rollout.keep_failed_s)
                self._records.enter_version(version, ServiceVersionState.UNHEALTHY, r.end)
            else:
                self._draining.retire(version, r.end)
        self._s.rollout = None
        if r.base:
            primary = self._s.versions.get(self._s.primary or "")
            name = primary.spec.name if primary is not None else "no version"
            self._records.enter(ServiceState.RUNNING, f"{name} serves; {r.end}")
        else:
            self._records.enter(ServiceState.UNHEALTHY, r.end)
        self._wake()
