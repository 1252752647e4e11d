"""ServiceWorkflow: one per service, for its whole life, from the first deploy to its termination.

Messages store what is wanted or what happened. ``_reconcile`` lets each phase compare that with what there is and start
the missing steps; then the records are written. Between changes the workflow sleeps on one condition and one timer: a
service to which nothing happens adds no event to its history.

Danger: the order in which the phases start their steps is the order of the commands in the history.
"""

from __future__ import annotations

from datetime import datetime

from temporalio import workflow
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from pydantic import ValidationError

    from heliostat.models.agents import ServeStatus
    from heliostat.models.services import Service, ServiceState
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
    from workflows.entity.alarm import Alarm, Deadline, Wakeup
    from workflows.entity.life import may_continue_as_new, shield
    from workflows.entity.recorder import Recorder
    from workflows.entity.steps import Steps
    from workflows.services.checklist import refresh, waiting_on
    from workflows.services.clusters import ServiceClusters
    from workflows.services.commands import HeadCommands
    from workflows.services.deploys import Deploys
    from workflows.services.draining import Draining
    from workflows.services.endpoint import ServiceEndpoint
    from workflows.services.health import Health
    from workflows.services.idle import IdleTermination
    from workflows.services.orders import RolloutOrders
    from workflows.services.records import ServiceRecords
    from workflows.services.replacement import Replacement
    from workflows.services.rollout.rollout import WATCH, Rollouts
    from workflows.services.rollout.transition import Transition
    from workflows.services.serve import ServeOnHeads
    from workflows.services.state import ServiceData
    from workflows.services.termination import Termination
    from workflows.services.versions import Versions
    from workflows.services.view import service_resource, version_resource


@workflow.defn
class ServiceWorkflow:
    @workflow.init
    def __init__(self, request: ServiceInput) -> None:
        self.input = arg = request
        if request.state is not None:
            self.s = s = ServiceData.model_validate(request.state)
            refresh(s, workflow.now())
        else:
            self.s = s = ServiceData.begun(workflow.now(), request.revision)
        shown = "" if request.state is not None else ServiceState.STARTING.value
        # Nothing is written before the records have confirmed the first deploy.
        self._recorder = Recorder(arg.service_id, shown=shown)
        self._wake = wake = Wakeup()
        self._alarm = Alarm(wake)
        self._steps = steps = Steps(self._recorder, wake, retry_after=policies.step_retry_after)
        self._records = records = ServiceRecords(arg, s, self._recorder, wake)

        commands = HeadCommands(arg, s)
        self._clusters = ServiceClusters(arg, s, records)
        self._serve = ServeOnHeads(arg, s, records, commands)
        self._versions = Versions(s, records, steps, self._clusters, self._serve)
        self._endpoint = ServiceEndpoint(arg, s, records, steps, wake)
        self._draining = draining = Draining(arg, s, records, steps, commands)
        self._replacement = Replacement(s, records, steps, draining)
        transition = Transition(s, records, wake, draining)
        self._rollouts = Rollouts(s, records, steps, wake, draining, transition)
        self._deploys = Deploys(arg, s, records, steps, wake, transition, self._rollouts)
        self._orders = RolloutOrders(arg.name, s, records, transition, self._deploys)
        self._health = Health(s, records)
        self._idle = IdleTermination(s, steps)
        self._termination = Termination(s, records, steps, draining, self._endpoint, self._deploys)

    # --- life ---------------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, _: ServiceInput) -> str:
        await shield(self._live(), self._terminate)
        if (next_life := self._deploys.next_life()) is not None:
            workflow.continue_as_new(next_life)
        return "withdrawn" if self._deploys.cancelled else f"{self.s.state}: {self.s.reason}"  # words: ok

    async def _live(self) -> None:
        while not self._deploys.cancelled and (self._recorder.dirty or not self.s.state.settled):
            self._wake.clear()
            self._steps.raise_bug()
            deadlines = [] if self.s.state.settled else self._reconcile(workflow.now())
            if self._recorder.dirty and not self._recorder.held:
                await self._records.flush()
                continue
            # The next run starts the canary's watch again.
            if may_continue_as_new(self._recorder, busy=bool(self._steps.running - {WATCH} or self.s.pending)):
                workflow.continue_as_new(self.input.model_copy(update={"state": self.s.model_dump(mode="json")}))
            self._alarm.set([*deadlines, *self._steps.deadlines(), self._recorder.deadline()])
            await self._wake.wait()
        # A step that the workflow's end cut off could not be undone; its end must not come before the step's.
        await workflow.wait_condition(lambda: not self._steps.running)

    def _reconcile(self, now: datetime) -> list[Deadline | None]:
        deadlines: list[Deadline | None] = []
        if self.s.terminate is not None:
            self._termination.reconcile()
        else:
            self._deploys.reconcile()
            self._replacement.reconcile()
            deadlines.append(self._versions.reconcile(now))
            self._endpoint.reconcile()
            self._rollouts.reconcile()
            deadlines.append(self._draining.retire_inspected(now))
            self._health.reconcile()
            deadlines.append(self._idle.reconcile(now))
            self._records.set_waiting_on(waiting_on(self.s, self._endpoint.trouble))
        deadlines.append(self._draining.reconcile(now))
        self._replacement.release_replaced()
        return deadlines

    # --- messages -----------------------------------------------------------------------------------------

    @workflow.signal(description="Deploy new versions")
    def deploy(self, request: DeployRequest) -> None:
        self._deploys.add(request)

    @workflow.signal(description="A cluster of this service changed")
    def cluster_changed(self, notice: ClusterNotice) -> None:
        self._clusters.observe(notice)

    @workflow.signal(description="Serve's status on a head changed")
    def serve_fact(self, fact: NodeFact) -> None:
        if self.s.first_sight(fact.event_id):
            try:
                status = ServeStatus.model_validate(fact.data)
            except ValidationError:
                return  # an exception in a handler would stop the workflow; the API has checked it already
            self._serve.observe(fact.cluster_id, status)

    @workflow.signal(description="Its load balancer no longer exists, or has lost its backends")
    def endpoint_lost(self, message: EndpointLost) -> None:
        self._endpoint.observe_loss(message)

    @workflow.signal(description="An unrecoverable error of its load balancer, or the end of one")
    def endpoint_trouble(self, message: EndpointTrouble) -> None:
        self._endpoint.observe_trouble(message)

    @workflow.update(description="Pause, resume, promote or abort the rollout")
    def rollout(self, order: RolloutOrder) -> None:
        self._orders.apply(order)

    @rollout.validator
    def _check_rollout(self, order: RolloutOrder) -> None:
        self._orders.check(order)

    @workflow.update(description="Return to the version before")
    def rollback(self, order: RollbackOrder) -> None:
        self._orders.roll_back(order)

    @rollback.validator
    def _check_rollback(self, order: RollbackOrder) -> None:
        self._check_not_terminating()
        self._orders.check_rollback()

    @workflow.update(description="Set the tokens that the proxies accept")
    def set_gate(self, order: GateOrder) -> None:
        self.s.gate = order.gate
        self._records.event("tokens", f"{len(order.gate.hashes)} valid tokens", actor=order.actor)
        self._wake()

    @set_gate.validator
    def _check_gate(self, order: GateOrder) -> None:
        self._check_not_terminating()

    def _check_not_terminating(self) -> None:
        if self.s.terminate is not None:
            raise ApplicationError(f"service {self.input.name} is terminating", type="conflict")

    @workflow.update(description="Terminate the service")
    def terminate(self, request: TerminateRequest) -> None:
        self._terminate(request)

    def _terminate(self, request: TerminateRequest) -> None:
        if self.s.terminate is None:
            self.s.terminate = request
            self._wake()

    @workflow.query(description="The service with its versions, as it is now")
    def status(self) -> Service:
        service = service_resource(self.input, self.s)
        service.versions = [version_resource(self.input, self.s, v) for v in self.s.versions.values()]
        return service

    @workflow.query(description="Ids of the clusters that this workflow holds")
    def owned(self) -> list[str]:
        return [slot.cluster_id for v in self.s.versions.values() for slot in v.all_slots if slot.cluster_id]
