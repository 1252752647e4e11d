"""Canary analysis: the new version's share is measured against the versions before, at each step and while it waits."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.canaries import CanaryActivities, StepVerdict, WatchStep
    from heliostat.models.common import EventLevel
    from workflows import policies
    from workflows.entity.alarm import Wakeup
    from workflows.entity.commands import cancel_quietly
    from workflows.services.records import ServiceRecords
    from workflows.services.rollout.transition import Transition
    from workflows.services.rollout_state import RolloutData
    from workflows.services.state import ServiceData, VersionData


class Canary:
    def __init__(self, s: ServiceData, records: ServiceRecords, wake: Wakeup, transition: Transition) -> None:
        self._s = s
        self._records = records
        self._wake = wake
        self._transition = transition

    async def hold(self, r: RolloutData, version: VersionData) -> bool:
        """Holds a step and watches the canary. False: the rollout is to stop."""
        rules = version.spec.rollout
        hold = timedelta(seconds=rules.hold_s)
        r.holds_until = workflow.now() + hold
        self._records.touch_service()
        self._wake()
        watch = self._watch(r, version, hold)
        try:
            ok = await self._transition.wait(
                r,
                lambda: watch.done() or not version.fit or r.skip,
                r.deadline,
                f"the rollout did not complete within {rules.timeout_s:g} s",
            )
            if not ok:
                return False
            if r.skip:
                r.skip = False
                return True
            return await self._evaluate(r, version, watch, version.fit)
        finally:
            cancel_quietly(watch)
            r.holds_until = None

    async def watch_in_background(self, r: RolloutData) -> None:
        """While no step is held: the rollout waits for a user, or capacity moves. The canary has traffic then too, and
        is rolled back as at any step."""
        version = self._s.versions[r.version_id]
        watch = self._watch(r, version, policies.PAUSED_WATCH, policies.PAUSED_WINDOW_S)
        try:
            await workflow.wait_condition(
                lambda: (
                    watch.done() or not version.serves or not r.watched_in_background or self._s.terminate is not None
                )
            )
            if r.watched_in_background and self._s.terminate is None:
                await self._evaluate(r, version, watch, version.serves)
        finally:
            cancel_quietly(watch)

    def _watch(
        self, r: RolloutData, version: VersionData, hold: timedelta, window_s: float | None = None
    ) -> workflow.ActivityHandle[StepVerdict]:
        return workflow.start_activity_method(
            CanaryActivities.watch_canary,
            WatchStep(
                canary=[s.cluster_id for s in version.slots],
                running=[s.cluster_id for v in r.base for s in self._s.versions[v].slots if s.open],
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

    async def _evaluate(
        self, r: RolloutData, version: VersionData, watch: workflow.ActivityHandle[StepVerdict], healthy: bool
    ) -> bool:
        """The verdict on a canary whose watch is over, or which is not healthy. False: it ends the rollout."""
        if not healthy:
            why = version.failure or next(
                (s.message or s.reason for s in version.slots if not s.fit(version.spec.id)), ""
            )
            self._transition.end(r, f"{version.spec.name} is not healthy at {r.percent} %: {why}", failed=True)
            return False
        verdict = await watch
        r.observed = verdict.observed
        self._records.touch_service()
        if verdict.breach:
            breach = f"{version.spec.name} at {r.percent} %: {verdict.breach}"
            self._records.event("breach", breach, level=EventLevel.WARNING)
            self._transition.end(r, breach, failed=True)
            return False
        return True
