"""What users may do with a rollout: pause, resume, promote, abort, roll back."""

from __future__ import annotations

from temporalio import workflow
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from heliostat.models.services import RolloutAction
    from runtime.messages.services import RollbackOrder, RolloutOrder
    from workflows.services.deploys import Deploys
    from workflows.services.patches import PENDING_BACK
    from workflows.services.records import ServiceRecords
    from workflows.services.rollout.transition import Transition
    from workflows.services.rollout_state import RolloutKind
    from workflows.services.state import ServiceData


class RolloutOrders:
    """Each ``check_…`` is an update's validator: it only raises ``ApplicationError``, and changes nothing."""

    def __init__(
        self, name: str, s: ServiceData, records: ServiceRecords, transition: Transition, deploys: Deploys
    ) -> None:
        self._name = name
        self._s = s
        self._records = records
        self._transition = transition
        self._deploys = deploys

    def check(self, order: RolloutOrder) -> None:
        r = self._s.rollout
        if order.action == RolloutAction.ABORT and self._deploys.about_to_start:
            return
        if r is None or r.end:
            raise ApplicationError(f"service {self._name} has no rollout in progress", type="conflict")
        if order.action == RolloutAction.PROMOTE and r.kind != RolloutKind.STEPS:
            raise ApplicationError(
                "this rollout has no steps to skip: the version gets its share as soon as it is healthy",
                type="conflict",
            )
        if order.action == RolloutAction.PROMOTE and order.percent is not None and order.percent <= r.percent:
            raise ApplicationError(f"the new version already has {r.percent} % of the traffic", type="invalid_request")
        if order.action == RolloutAction.RESUME and not r.paused:
            raise ApplicationError("the rollout is not paused", type="conflict")
        if order.action == RolloutAction.ABORT and not r.base:
            raise ApplicationError(
                "this is the first version, so there is no version to return to: terminate the service, or deploy "
                "another version",
                type="conflict",
            )

    def apply(self, order: RolloutOrder) -> None:
        r = self._s.rollout
        if r is None:
            self._deploys.cancel_pending(order.actor)
            return
        match order.action:
            case RolloutAction.PAUSE:
                self._transition.pause(r, "paused by a user", order.actor)
            case RolloutAction.RESUME:
                if r.stop_at is not None and r.percent >= r.stop_at:
                    r.stop_at = None
                self._records.event("rollout_resumed", f"at {r.percent} %", actor=order.actor)
                self._transition.resume(r)
            case RolloutAction.PROMOTE:
                goal = order.percent or 100
                r.steps, r.stop_at = [goal], goal if goal < 100 else None
                r.skip, r.held = r.doing == "holding" and not r.paused, True
                self._records.event("rollout_promoted", f"from {r.percent} % to {goal} %", actor=order.actor)
                self._transition.resume(r)
            case RolloutAction.ABORT:
                self._transition.end(r, f"aborted by {order.actor}")

    def check_rollback(self) -> None:
        r = self._s.rollout
        if r is not None and not r.base:
            raise ApplicationError("this is the first version: there is no version to return to", type="conflict")
        if r is None and self._s.previous not in self._s.versions and not self._deploys.about_to_start:
            raise ApplicationError("no earlier version has completed its rollout", type="conflict")

    def roll_back(self, order: RollbackOrder) -> None:
        if self._s.rollout is not None:
            why = f": {order.reason}" if order.reason else ""
            self._transition.end(self._s.rollout, f"rolled back by {order.actor}{why}")
            return
        if self._deploys.about_to_start and workflow.patched(PENDING_BACK):
            self._deploys.cancel_pending(order.actor)
            return
        self._deploys.return_to_previous(order.actor)
