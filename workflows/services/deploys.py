"""Deploys on their way to a rollout: accepted by the API, pending here until the records confirm them."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.records import RecordActivities
    from heliostat.models.services import ServiceVersionState
    from runtime.messages.services import DeployRequest, ServiceInput
    from workflows import policies
    from workflows.entity.alarm import Wakeup
    from workflows.entity.steps import Steps
    from workflows.services.records import ServiceRecords
    from workflows.services.rollout.rollout import Rollouts
    from workflows.services.rollout.transition import Transition
    from workflows.services.state import ServiceData, VersionData

START = "start a deploy"


class Deploys:
    def __init__(
        self,
        arg: ServiceInput,
        s: ServiceData,
        records: ServiceRecords,
        steps: Steps,
        wake: Wakeup,
        transition: Transition,
        rollouts: Rollouts,
    ) -> None:
        self._arg = arg
        self._s = s
        self._records = records
        self._steps = steps
        self._wake = wake
        self._transition = transition
        self._rollouts = rollouts
        self.cancelled = False
        """The API rolled the first deploy back, and so the service: nothing was made."""

    def add(self, request: DeployRequest) -> None:
        if self._s.first_sight(request.id):
            self._s.pending.append(request)
            if request.gate is not None:
                self._s.gate = request.gate
            self._wake()

    def reconcile(self) -> None:
        """The newest deploy wins: it ends the current rollout and supersedes the deploys before it."""
        if not self._s.pending:
            return
        if self._s.rollout is not None:
            newest = self._s.pending[-1]
            names = ", ".join(spec.name for spec in newest.versions) or "new weights"
            self._transition.end(self._s.rollout, f"superseded by {names}")
            return
        self._steps.start(START, self._start_pending)

    async def _start_pending(self) -> None:
        """A deploy starts only when the records confirm it: the API may have rolled its acceptance back."""
        while self._s.pending and self._s.rollout is None:
            request = self._s.pending[0]
            accepted: bool = request.back or await workflow.execute_local_activity_method(
                RecordActivities.claim_deploy, request.id, summary="confirm the deploy", **policies.RECORD
            )
            self._s.pending.remove(request)
            if not accepted:
                if not self._s.versions and not self._s.pending:
                    self.cancelled = True
            elif self._s.pending and not request.back:
                cancelled = not self._s.pending[0].versions and self._s.pending[0].back
                self._skip(request, f"{'cancelled' if cancelled else 'superseded'} before it started")
            elif request.back and not request.versions:
                self._records.event("rolled_back", "the pending deploy is cancelled", actor=request.actor)
            else:
                self._rollouts.begin(request, back=request.back)

    @property
    def about_to_start(self) -> bool:
        """A deploy is pending and becomes a rollout as soon as the records confirm it."""
        return self._s.rollout is None and self._s.primary is not None and any(not d.back for d in self._s.pending)

    def cancel_pending(self, actor: str) -> None:
        """A request without versions supersedes what is pending: the service stays where it is."""
        self._s.pending.append(DeployRequest(id=f"stay-{self._s.revision}", actor=actor, back=True))
        self._wake()

    def return_to_previous(self, actor: str) -> None:
        previous = self._s.versions[str(self._s.previous)]
        self._s.pending.append(
            DeployRequest(
                id=f"back-{previous.spec.id}-{self._s.revision}",
                actor=actor,
                versions=[previous.spec],
                in_place=previous.replaced_by == self._s.primary,
                back=True,
            )
        )
        self._wake()

    def _skip(self, request: DeployRequest, why: str) -> None:
        """Nothing was made for this deploy, and nothing will be."""
        now = workflow.now()
        for spec in request.versions:
            version = VersionData(
                spec=spec, state=ServiceVersionState.TERMINATED, reason=why,
                state_since=now, ended_at=now,
            )  # fmt: skip
            self._s.versions[spec.id] = version
            self._records.touch(version)
        names = ", ".join(s.name for s in request.versions) or "new weights"
        self._records.event("superseded", f"{names}: {why}", actor=request.actor)

    # --- after a terminate --------------------------------------------------------------------------------

    def refuse_late(self) -> None:
        if self._late():
            self._steps.start(START, self._refuse)

    async def _refuse(self) -> None:
        """Claims a late deploy all the same: the monitor would send it again, and so start the service again."""
        while late := self._late():
            request = late[0]
            if not request.back:
                await workflow.execute_local_activity_method(
                    RecordActivities.claim_deploy, request.id, summary="refuse a late deploy", **policies.RECORD
                )
            self._s.pending.remove(request)
            self._skip(request, "the service terminates")

    def _late(self) -> list[DeployRequest]:
        return [request for request in self._s.pending if not self._is_of_next_life(request)]

    def _is_of_next_life(self, request: DeployRequest) -> bool:
        """The records say TERMINATED a moment before this workflow ends; somebody has deployed again by then."""
        return request.life is not None and request.life > self._arg.revision

    def next_life(self) -> ServiceInput | None:
        """The service started again with the deploys that came for it; None when none came."""
        deploys = [request for request in self._s.pending if self._is_of_next_life(request)]
        if not deploys:
            return None
        revision = max(request.life or 0 for request in deploys)
        state = ServiceData.begun(workflow.now(), revision)
        state.pending, state.gate, state.seen = deploys, self._s.gate, self._s.seen
        return self._arg.model_copy(update={"revision": revision, "state": state.model_dump(mode="json")})
