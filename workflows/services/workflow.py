"""ServiceWorkflow: one per service, for its whole life, from the first deploy to its termination.

Messages store what is wanted or what happened; ``_decide`` compares that with what there is and starts what is
missing; ``_flush`` tells the records. A deploy is a rollout (``service_rollouts``); the clusters, Serve on them and the
endpoint are tended beside it all the time (``service_clusters``), also when nothing is being rolled out: a head that is
lost and replaced gets its applications again without anybody's doing.

Between changes the workflow sleeps on a condition and one timer: a service to which nothing happens adds no event.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from pydantic import ValidationError

    from activities.canaries import CanaryActivities, LastTraffic
    from activities.records import RecordActivities
    from heliostat.models.agents import ServeStatus
    from heliostat.models.common import EventLevel
    from heliostat.models.services import RolloutAction, Service, ServiceState, ServiceVersionState
    from runtime.messages.clusters import ClusterNotice, NodeFact
    from runtime.messages.common import TerminateRequest
    from runtime.messages.services import (
        DeployRequest,
        EndpointLost,
        EndpointTrouble,
        GateOrder,
        RollbackOrder,
        RolloutOrder,
        ServiceInput,
    )
    from workflows import policies
    from workflows.services.rollout.rollout import ServiceRollouts
    from workflows.services.state import RolloutKind, ServiceData, VersionData
    from workflows.services.view import service_resource, version_resource

WATCH_BESIDE = "watch the canary"

PENDING_BACK = "a rollback gives up what is pending"
"""Patch: it went back to the version before while the deploy before it was not taken up yet."""


@workflow.defn
class ServiceWorkflow(ServiceRollouts):
    @workflow.init
    def __init__(self, request: ServiceInput) -> None:
        super().__init__(request)
        self._endpoint_gone = False

    # --- what others say ----------------------------------------------------------------------------------

    @workflow.signal(description="New versions to go to")
    def deploy(self, request: DeployRequest) -> None:
        if self.s.first_sight(request.id):
            self.s.pending.append(request)
            if request.gate is not None:
                self.s.gate = request.gate
            self._wake()

    @workflow.signal(description="A cluster of this service changed")
    def cluster_changed(self, notice: ClusterNotice) -> None:
        self._hear(notice)

    @workflow.signal(description="What Serve says on a head, changed")
    def serve_fact(self, fact: NodeFact) -> None:
        if self.s.first_sight(fact.event_id):
            try:
                status = ServeStatus.model_validate(fact.data)
            except ValidationError:
                return  # an exception in a handler would stop the workflow; the API has checked it already
            self._take_status(fact.cluster_id, status)

    @workflow.signal(description="Its load balancer is not there any more, or has lost its backends")
    def endpoint_lost(self, message: EndpointLost) -> None:
        if self.s.first_sight(message.event_id) and self.s.url and self.s.terminate is None:
            self._event("endpoint_lost", message.reason, level=EventLevel.ERROR)
            self.s.endpoint_lost = True
            self._wake()

    @workflow.signal(description="What of its load balancer can't be mended")
    def endpoint_trouble(self, message: EndpointTrouble) -> None:
        if self.s.first_sight(message.event_id) and message.trouble != self.s.endpoint_trouble:
            self.s.endpoint_trouble = message.trouble
            bad = bool(message.trouble)
            level = EventLevel.ERROR if bad else EventLevel.INFO
            self._event("endpoint_trouble", message.trouble or "its load balancer is well again", level=level)
            self._wake()

    @workflow.update(description="Pause, resume, promote or abort the rollout")
    def rollout(self, order: RolloutOrder) -> None:
        r = self.s.rollout
        if r is None:
            self._stay(order.actor)
            return
        match order.action:
            case RolloutAction.PAUSE:
                self._pause(r, "a person paused it", order.actor)
            case RolloutAction.RESUME:
                if r.stop_at is not None and r.percent >= r.stop_at:
                    r.stop_at = None
                self._event("rollout_resumed", f"at {r.percent} %", actor=order.actor)
                self._unpause(r)
            case RolloutAction.PROMOTE:
                goal = order.percent or 100
                r.steps, r.stop_at = [goal], goal if goal < 100 else None
                r.skip, r.held = r.doing == "holding" and not r.paused, True
                self._event("rollout_promoted", f"from {r.percent} % to {goal} %", actor=order.actor)
                self._unpause(r)
            case RolloutAction.ABORT:
                self._end_rollout(r, f"aborted by {order.actor}")

    def _begins(self) -> bool:
        """A deploy was heard, and is a rollout as soon as the records say that it is still wanted."""
        return self.s.rollout is None and self.s.primary is not None and any(not d.back for d in self.s.pending)

    @rollout.validator
    def _may_steer(self, order: RolloutOrder) -> None:
        r = self.s.rollout
        if order.action == RolloutAction.ABORT and self._begins():
            return
        if r is None or r.end:
            raise ApplicationError(f"service {self.input.name} has no rollout under way", type="conflict")
        if order.action == RolloutAction.PROMOTE and r.kind != RolloutKind.STEPS:
            raise ApplicationError(
                "there are no steps to skip: it has its share as soon as it is healthy", type="conflict"
            )
        if order.action == RolloutAction.PROMOTE and order.percent is not None and order.percent <= r.percent:
            raise ApplicationError(f"it has {r.percent} % already", type="invalid_request")
        if order.action == RolloutAction.RESUME and not r.paused:
            raise ApplicationError("the rollout is not paused", type="conflict")
        if order.action == RolloutAction.ABORT and not r.base:
            raise ApplicationError(
                "there is no version to go back to: terminate the service, or deploy another version", type="conflict"
            )

    @workflow.update(description="Back to the version before")
    def rollback(self, order: RollbackOrder) -> None:
        why = f": {order.reason}" if order.reason else ""
        if self.s.rollout is not None:
            self._end_rollout(self.s.rollout, f"rolled back by {order.actor}{why}")
            return
        if self._begins() and workflow.patched(PENDING_BACK):
            self._stay(order.actor)
            return
        before = self.s.versions[str(self.s.previous)]
        self.s.pending.append(
            DeployRequest(
                id=f"back-{before.spec.id}-{self.s.revision}",
                actor=order.actor,
                versions=[before.spec],
                in_place=before.replaced_by == self.s.primary,
                back=True,
            )
        )
        self._wake()

    @rollback.validator
    def _may_roll_back(self, order: RollbackOrder) -> None:
        self._may_change()
        r = self.s.rollout
        if r is not None and not r.base:
            raise ApplicationError("there is no version to go back to: this is the first", type="conflict")
        if r is None and self.s.previous not in self.s.versions and not self._begins():
            raise ApplicationError("there is no finished version before this one", type="conflict")

    @workflow.update(description="Tokens that the proxies ask for")
    def set_gate(self, order: GateOrder) -> None:
        self.s.gate = order.gate
        self._event("tokens", f"{len(order.gate.hashes)} valid tokens", actor=order.actor)
        self._wake()

    @set_gate.validator
    def _may_set_gate(self, order: GateOrder) -> None:
        self._may_change()

    @workflow.update(description="End the service")
    def terminate(self, request: TerminateRequest) -> None:
        if self.s.terminate is None:
            self.s.terminate = request
            self._wake()

    def _may_change(self) -> None:
        if self.s.terminate is not None:
            raise ApplicationError(f"service {self.input.name} is ending", type="conflict")

    @workflow.query(description="The service as it is now, versions included")
    def status(self) -> Service:
        service = service_resource(self.input, self.s)
        service.versions = [version_resource(self.input, self.s, v) for v in self.s.versions.values()]
        return service

    @workflow.query(description="Clusters that this workflow holds")
    def owned(self) -> list[str]:
        return [slot.cluster_id for v in self.s.versions.values() for slot in v.held if slot.cluster_id]

    # --- the life -----------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, _: ServiceInput) -> str:
        # See ClusterWorkflow.run: a cancel from the UI means the same as a terminate.
        life = asyncio.create_task(self._live())
        while not life.done():
            try:
                await asyncio.shield(life)
            except asyncio.CancelledError:
                if self.s.terminate is None:
                    self.s.terminate = TerminateRequest(actor="operator", reason="cancelled in Temporal")
                    self._wake()
        life.result()
        await workflow.wait_condition(workflow.all_handlers_finished)
        if any(self._is_of_next_life(request) for request in self.s.pending):
            workflow.continue_as_new(self._next_life())
        return "withdrawn" if self._withdrawn else f"{self.s.state}: {self.s.reason}"

    async def _live(self) -> None:
        while not self._withdrawn and (self._dirty or not self.s.state.settled):
            self._woken = False
            if self._bug is not None:
                raise self._bug
            if not self.s.state.settled:
                self._decide()
            if self._dirty and not self._flush_is_held():
                await self._flush()
                continue
            if self._may_continue_as_new():
                workflow.continue_as_new(
                    self.input.model_copy(update={"state": self.s.model_dump(mode="json")}),
                )
            self._set_alarm()
            await workflow.wait_condition(lambda: self._woken)
        # A step that is cut off by the workflow's end could not be undone, and its end may not come before the step's.
        await workflow.wait_condition(lambda: not self._tasks)

    def _decide(self) -> None:
        now = workflow.now()
        if self.s.terminate is not None:
            self._end()
        else:
            self._take_up()
            self._tend_notices()
            self._tend(now)
            self._tend_endpoint()
            r = self.s.rollout
            if r is not None and not r.paused:
                self._start("rollout", self._roll)
            if r is not None and r.beside:
                self._start(WATCH_BESIDE, lambda: self._watch_beside(r))
            self._check_kept(now)
            self._check_health()
            self._check_idle(now)
            self._say_waits()
        self._tend_retired()
        self._tend_leaving()

    def _take_up(self) -> None:
        """The newest deploy counts: what is under way makes room for it, those before it are passed over."""
        if not self.s.pending:
            return
        if self.s.rollout is not None:
            newest = self.s.pending[-1]
            names = ", ".join(spec.name for spec in newest.versions) or "new weights"
            self._end_rollout(self.s.rollout, f"superseded by {names}")
            return
        self._start("take up a deploy", self._claim)

    async def _claim(self) -> None:
        """Undo of the acceptance: a deploy that the API took back is passed over."""
        while self.s.pending and self.s.rollout is None:
            request = self.s.pending[0]
            accepted: bool = request.back or await workflow.execute_local_activity_method(
                RecordActivities.claim_deploy, request.id, summary="is it still wanted?", **policies.RECORD
            )
            self.s.pending.remove(request)
            if not accepted:
                if not self.s.versions and not self.s.pending:
                    self._withdrawn = True  # it was the first deploy: nothing was made
            elif self.s.pending and not request.back:
                stays = not self.s.pending[0].versions and self.s.pending[0].back
                self._pass_over(request, "given up before it began" if stays else "superseded before it began")
            elif request.back and not request.versions:
                self._event("rolled_back", "what was deployed last is given up", actor=request.actor)
            else:
                self._begin(request, back=request.back)

    def _stay(self, actor: str) -> None:
        """What is pending is passed over: to stay where it is was asked for last."""
        self.s.pending.append(DeployRequest(id=f"stay-{self.s.revision}", actor=actor, back=True))
        self._wake()

    def _pass_over(self, request: DeployRequest, why: str) -> None:
        """Nothing was made for this deploy yet, and nothing will be."""
        now = workflow.now()
        for spec in request.versions:
            version = VersionData(
                spec=spec, state=ServiceVersionState.TERMINATED, reason=why,
                state_since=now, ended_at=now,
            )  # fmt: skip
            self.s.versions[spec.id] = version
            self._touch(version)
        names = ", ".join(s.name for s in request.versions) or "new weights"
        self._event("superseded", f"{names}: {why}", actor=request.actor)

    def _check_kept(self, now: datetime) -> None:
        for version in self.s.versions.values():
            if version.kept_until is not None and now >= version.kept_until:
                version.kept_until = None
                self._retire(version, version.reason)

    def _check_health(self) -> None:
        """Of a service that is not under way: does anything answer?"""
        if self.s.rollout is not None or self.s.primary is None or not self.s.weights:
            return
        serving = [self.s.versions[v] for v in self.s.weights if v in self.s.versions]
        slots = [(v, slot) for v in serving for slot in v.slots]
        fit = [slot for v, slot in slots if slot.serves(v.spec.id)]
        names = ", ".join(v.spec.name for v in serving)
        if self.s.endpoint_trouble:
            self._enter(ServiceState.UNHEALTHY, f"its load balancer: {self.s.endpoint_trouble}")
            return
        if not fit:
            why = next((s.message or s.reason for _, s in slots if s.message or s.reason), "")
            self._enter(ServiceState.UNHEALTHY, f"no cluster of {names} serves: {why}".rstrip(": "))
            return
        partial = "" if len(fit) == len(slots) else f" on {len(fit)} of {len(slots)} clusters"
        if self.s.state == ServiceState.UNHEALTHY or partial != self.s.partial:
            self.s.partial = partial
            self._enter(ServiceState.RUNNING, f"{names} serves{partial}")

    # --- idleness -----------------------------------------------------------------------------------------

    def _check_idle(self, now: datetime) -> None:
        """Only where the service's config asks for it; unknown counts as busy, and so does a rollout."""
        limit = self.s.versions[self.s.primary].spec.idle_termination_minutes if self.s.primary else None
        if limit is None or self.s.rollout is not None or self.s.state != ServiceState.RUNNING:
            self.s.idle_due = None
        elif self.s.idle_due is None:
            self.s.idle_due = now + timedelta(minutes=limit)
        elif now >= self.s.idle_due:
            self._start("idle check", lambda: self._ask_traffic(limit))

    async def _ask_traffic(self, limit: float) -> None:
        clusters = [slot.cluster_id for v in self.s.weights for slot in self.s.versions[v].slots]
        seen: LastTraffic = await workflow.execute_activity_method(
            CanaryActivities.last_traffic, clusters, summary="when did the newest request come?", **policies.TRAFFIC
        )
        now, within = workflow.now(), timedelta(minutes=limit)
        if self.s.terminate is not None or self.s.rollout is not None or self.s.pending:
            return
        if not seen.known:
            self.s.idle_due = now + within
        elif seen.at is not None and now - seen.at < within:
            self.s.idle_due = seen.at + within
        else:
            self.s.terminate = TerminateRequest(actor="idle shutdown", reason=f"no request for {limit:g} minutes")

    # --- ending -------------------------------------------------------------------------------------------

    def _end(self) -> None:
        assert self.s.terminate is not None
        if self.s.state != ServiceState.TERMINATING:
            reason = self.s.terminate.reason or "asked to end"
            self._enter(ServiceState.TERMINATING, reason, self.s.terminate.actor)
            self._say("what is under way to end, then its clusters to be released")
            self.s.rollout, self.s.weights = None, {}
            for version in self.s.versions.values():
                version.kept_until = None
                self._retire(version, f"the service ends: {reason}")
        if self.s.backends and self.s.url:
            self._start("backends", self._set_backends)
        if self._too_late():
            self._start("take up a deploy", self._refuse)
        if self._endpoint_trouble:
            self._say(self._endpoint_trouble)
        passed_over = {"remove the endpoint", *(["backends"] if self._ends_since(policies.TERMINATE_UNTOLD) else [])}
        others = self._tasks.keys() - passed_over
        if others or any(v.state != ServiceVersionState.TERMINATED for v in self.s.versions.values()):
            return
        if self.s.url or not self._endpoint_gone:
            self._start("remove the endpoint", self._remove_last)
        else:
            self.s.waits_for = ""
            self._enter(ServiceState.TERMINATED, self.s.terminate.reason or "ended", self.s.terminate.actor)

    async def _refuse(self) -> None:
        """What came too late is claimed all the same: the monitor would give it to us again, and so start us again."""
        while late := self._too_late():
            request = late[0]
            if not request.back:
                await workflow.execute_local_activity_method(
                    RecordActivities.claim_deploy, request.id, summary="it came too late", **policies.RECORD
                )
            self.s.pending.remove(request)
            self._pass_over(request, "the service ends")

    def _too_late(self) -> list[DeployRequest]:
        return [request for request in self.s.pending if not self._is_of_next_life(request)]

    def _is_of_next_life(self, request: DeployRequest) -> bool:
        """The records say TERMINATED a moment before this workflow ends, and somebody has deployed again by then."""
        return request.life is not None and request.life > self.input.revision

    def _next_life(self) -> ServiceInput:
        """As of a service that is started again, with what was deployed to it."""
        deploys = [request for request in self.s.pending if self._is_of_next_life(request)]
        revision = max(request.life or 0 for request in deploys)
        state = ServiceData.begun(workflow.now(), revision)
        state.pending, state.gate, state.seen = deploys, self.s.gate, self.s.seen
        return self.input.model_copy(update={"revision": revision, "state": state.model_dump(mode="json")})

    async def _remove_last(self) -> None:
        """Also where none is known: its making may have been cut off."""
        await self._remove_endpoint()
        self._endpoint_gone = True

    # --- helpers ------------------------------------------------------------------------------------------

    def _say_waits(self) -> None:
        r = self.s.rollout
        text = ""
        if r is not None:
            version = self.s.versions[r.version_id]
            missing = next((c for c in version.checklist.values() if not c.status), None)
            if r.paused:
                text = f"a person: rollout of {version.spec.name} is paused at {r.percent} %"
            elif r.doing == "holding":
                text = f"{version.spec.name} to show itself at {r.percent} %"
            elif missing is not None and r.doing in ("starting", "shifting"):
                text = f"{version.spec.name}: {missing.message}"
        if self._endpoint_trouble or self.s.endpoint_trouble:
            text = self._endpoint_trouble or f"the load balancer: {self.s.endpoint_trouble}"
        self._say(text)

    def _wishes(self) -> list[tuple[datetime, str]]:
        found = super()._wishes()
        if self.s.terminate is None:
            if self.s.idle_due is not None:
                found.append((self.s.idle_due, "has there been a request?"))
            for version in self.s.versions.values():
                if version.kept_until is not None:
                    found.append((version.kept_until, f"{version.spec.name} was kept for inspection until then"))
        return found

    def _may_continue_as_new(self) -> bool:
        return (
            workflow.info().is_continue_as_new_suggested()
            and not self._tasks.keys() - {WATCH_BESIDE}  # the next run begins that one anew
            and not self._dirty
            and not self.s.pending
            and workflow.all_handlers_finished()
        )
