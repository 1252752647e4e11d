"""Idle termination of a service whose config asks for it. Unknown counts as busy, and so does a rollout."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.canaries import CanaryActivities, LastTraffic
    from heliostat.models.services import ServiceState
    from runtime.messages.common import SYSTEM, TerminateRequest
    from workflows import policies
    from workflows.entity.alarm import Deadline, earliest
    from workflows.entity.steps import Steps
    from workflows.services.state import ServiceData


class IdleTermination:
    def __init__(self, s: ServiceData, steps: Steps) -> None:
        self._s = s
        self._steps = steps

    def reconcile(self, now: datetime) -> Deadline | None:
        limit = self._s.versions[self._s.primary].spec.idle_termination_minutes if self._s.primary else None
        if limit is None or self._s.rollout is not None or self._s.state != ServiceState.RUNNING:
            self._s.idle_due = None
        elif self._s.idle_due is None:
            self._s.idle_due = now + timedelta(minutes=limit)
        elif now >= self._s.idle_due:
            self._steps.start("idle check", partial(self._check_traffic, limit))
        return earliest(now, [(self._s.idle_due, "idle check")])

    async def _check_traffic(self, limit: float) -> None:
        clusters = [slot.cluster_id for v in self._s.weights for slot in self._s.versions[v].slots]
        seen: LastTraffic = await workflow.execute_activity_method(
            CanaryActivities.last_traffic, clusters, summary="time of the newest request", **policies.TRAFFIC
        )
        now, within = workflow.now(), timedelta(minutes=limit)
        if self._s.terminate is not None or self._s.rollout is not None or self._s.pending:
            return
        if not seen.known:
            self._s.idle_due = now + within
        elif seen.at is not None and now - seen.at < within:
            self._s.idle_due = seen.at + within
        else:
            self._s.terminate = TerminateRequest(actor=SYSTEM, reason=f"no request for {limit:g} minutes")
