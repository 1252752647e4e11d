"""ClusterWorkflow: one per cluster, for its whole life.

Messages store what is wanted or what happened. The main loop reconciles: each phase compares what is wanted with what
exists, starts steps for what is missing, and says when it must be called next. Then the records are written and the
lease holders notified. Nothing is periodic: between changes the workflow sleeps on a condition and one timer, so an
unchanged cluster adds no event to its history.

Every step is guarded by state: a node entry is ``REQUESTED`` before its launch, and carries the launch's token, so
that continue-as-new, a replay or a lost answer never makes a second machine.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from heliostat.models.agents import FactKind
    from heliostat.models.clusters import Activity, ClusterState, NodeRole, NodeState
    from runtime.messages.clusters import (
        ClusterInput,
        HeadSilent,
        LeaseAnswer,
        LeaseRequest,
        LimitsUpdate,
        NodeFact,
        NodeRegistered,
        OwnedMachine,
        Release,
    )
    from runtime.messages.common import TerminateRequest
    from workflows import policies
    from workflows.clusters.ending import Ending
    from workflows.clusters.healing import Healing
    from workflows.clusters.idle import Idle
    from workflows.clusters.launching import Launching
    from workflows.clusters.leases import Leases
    from workflows.clusters.nodes import Nodes
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.readiness import Readiness
    from workflows.clusters.records import ClusterRecords
    from workflows.clusters.retained import RetainedAttachment
    from workflows.clusters.scaling import Scaling
    from workflows.clusters.state import Bounds, ClusterData
    from workflows.entity.alarm import Alarm, Deadline, Wakeup, earliest
    from workflows.entity.life import may_continue_as_new, shield
    from workflows.entity.recorder import Recorder
    from workflows.entity.seen import first_sight
    from workflows.entity.steps import Steps


@workflow.defn
class ClusterWorkflow:
    @workflow.init
    def __init__(self, request: ClusterInput) -> None:
        first = request.state is None
        self.input = request
        self.s = s = _first_state(request) if request.state is None else ClusterData.model_validate(request.state)
        self.wake = wake = Wakeup()
        self.recorder = recorder = Recorder(
            request.cluster_id, shown=ClusterState.STARTING.value if first else "", dirty=first
        )
        self.alarm = Alarm(wake)
        self.steps = steps = Steps(recorder, wake)
        self.progress = progress = ClusterProgress(s, recorder, wake)
        self.nodes = nodes = Nodes(request, s, recorder, progress)
        self.leases = Leases(request, s, recorder, progress, steps)
        retained = RetainedAttachment(request, s, recorder, progress, nodes)
        self.launching = Launching(request, s, recorder, progress, steps, nodes, retained)
        self.healing = Healing(request, s, steps, wake, nodes)
        self.scaling = Scaling(request, s, recorder, progress, self.launching)
        self.readiness = Readiness(s, recorder, progress)
        self.idle = Idle(request, s, recorder, progress, steps, self.leases)
        self.ending = Ending(request, s, recorder, progress, steps, retained)
        self.records = ClusterRecords(request, s, recorder, progress, self.leases)

    # --- lifecycle ----------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, _: ClusterInput) -> str:
        await shield(self._live(), self._terminate)
        return "withdrawn" if self.records.cancelled else f"{self.s.phase}: {self.s.reason}"  # words: ok

    async def _live(self) -> None:
        # The records must have the end too: a write that failed is repeated until they have it.
        while not self.records.cancelled and (self.recorder.dirty or not self.s.phase.settled):
            self.wake.clear()
            self.steps.raise_bug()
            deadlines = self._settled_deadlines() if self.s.phase.settled else self._reconcile(workflow.now())
            if self.recorder.dirty and not self.recorder.held:
                await self.records.flush()
                continue
            if may_continue_as_new(self.recorder, busy=bool(self.steps.running)):
                workflow.continue_as_new(
                    self.input.model_copy(update={"state": self.s.model_dump(mode="json")}),
                )
            self.alarm.set([self.recorder.deadline(), *deadlines])
            await self.wake.wait()

    def _settled_deadlines(self) -> list[Deadline | None]:
        """An ended cluster only waits for its records. Danger: histories of older releases hold these timers."""
        uptime, check = self.s.uptime_deadline(self.input.config), self.leases.check_due()
        return [(uptime, "maximum uptime") if uptime else None, (check, "check the leases") if check else None]

    def _reconcile(self, now: datetime) -> list[Deadline | None]:
        """Compares what is wanted with what exists, and starts steps for the difference. Returns when to look again."""
        due: list[Deadline | None] = []
        if self.s.terminate is None:
            self.idle.check_uptime(now)
            self.readiness.check_deadline(now)
        if self.s.terminate is not None:
            self.ending.begin()
        else:
            self.healing.reconcile(now)
            self.scaling.reconcile(now)
            due.append(self.readiness.reconcile(now))
            due.append(self.idle.reconcile(now))
            due.append(self.leases.reconcile(now))
            due.append(earliest(now, self.healing.deadlines()))
        due.append(self.launching.reconcile(now))
        self.ending.reconcile()
        return due

    # --- messages from agents -----------------------------------------------------------------------------

    @workflow.signal(description="A node's agent has registered")
    def node_registered(self, message: NodeRegistered) -> None:
        node = self.s.nodes.get(message.node_id)
        if node is not None and node.live and first_sight(self.s.seen, message.event_id):
            self.nodes.registered(node, message)

    @workflow.signal(description="Agents of several nodes have registered")
    def nodes_registered(self, messages: list[NodeRegistered]) -> None:
        for message in messages:
            self.node_registered(message)

    @workflow.signal(description="A change that a node's agent observed")
    def fact(self, fact: NodeFact) -> None:
        if not first_sight(self.s.seen, fact.event_id):
            return
        subject = self.s.nodes.get(str(fact.data.get("node_id") or fact.node_id))
        reporter = self.s.nodes.get(fact.node_id)
        if subject is None or reporter is None or not reporter.live or not subject.live:
            return  # of a machine that must end: its reports no longer count
        reason = str(fact.data.get("reason") or "")
        match fact.kind:
            case FactKind.RAY_READY:
                self.nodes.running(subject, fact)
            case FactKind.NODE_LOST:
                self.nodes.lose(subject, reason or "Ray lost it", failed=subject.state != NodeState.RUNNING)
            case FactKind.NODE_FAILED:
                self.nodes.lose(subject, reason or "Ray did not start on it", failed=True)
            case FactKind.STOPPING:
                if subject.role == NodeRole.HEAD and self.s.terminate is None:
                    self.progress.terminate(reason, f"agent:{subject.id}")
                else:
                    self.nodes.lose(subject, reason, failed=False)
            case FactKind.ACTIVITY:
                activity = str(fact.data.get("activity"))
                self.s.activity = Activity(activity) if activity in tuple(Activity) else Activity.UNKNOWN
                self.recorder.dirty = True
            case FactKind.DESIRED:
                self.scaling.set_desired(fact)
            case FactKind.SPOT_NOTICE:
                self.nodes.interrupted(subject, fact)
            case FactKind.RUN_RUNNING | FactKind.RUN_ENDED:
                return  # these go to the job
        self.wake()

    @workflow.signal(description="Changes that a node's agent observed, in order")
    def facts(self, facts: list[NodeFact]) -> None:
        for fact in facts:
            self.fact(fact)

    @workflow.signal(description="The head has been silent for too long")
    def head_silent(self, message: HeadSilent) -> None:
        head = self.s.head
        if head is not None and head.id == message.node_id and head.machine_id:
            self.healing.check_silent_head(head, message)
            self.wake()

    # --- messages from lease holders and people -----------------------------------------------------------

    @workflow.update(description="Take a lease; answered at once")
    def acquire(self, request: LeaseRequest) -> LeaseAnswer:
        if self.leases.acquire(request):
            self.wake()
        return self.leases.answer()

    @acquire.validator
    def _validate_acquire(self, request: LeaseRequest) -> None:
        if self.s.terminate is not None or self.s.phase.settled:
            raise ApplicationError(f"cluster {self.input.name} is ending: {self.s.reason}", type="cluster_failed")

    @workflow.signal(description="A holder no longer needs the cluster")
    def release(self, message: Release) -> None:
        self.leases.release(message)
        self.wake()

    @workflow.update(description="End the cluster")
    def terminate(self, request: TerminateRequest) -> None:
        self._terminate(request)

    def _terminate(self, request: TerminateRequest) -> None:
        if self.s.terminate is None:
            self.s.terminate = request
            self.wake()

    @workflow.update(description="Change the bounds of a worker group")
    def set_limits(self, request: LimitsUpdate) -> None:
        self.scaling.set_limits(request)
        self.wake()

    @set_limits.validator
    def _validate_set_limits(self, request: LimitsUpdate) -> None:
        self.scaling.validate_limits(request)

    @workflow.query(description="Machines that this workflow owns; the sweep spares them")
    def owned(self) -> list[OwnedMachine]:
        return [
            OwnedMachine(node_id=n.id, machine_id=n.machine_id, token=n.token)
            for n in self.s.nodes.values()
            if n.state != NodeState.TERMINATED
        ]


def _first_state(request: ClusterInput) -> ClusterData:
    now, limits = workflow.now(), request.limits
    start = max(limits.capacity_timeout_s, limits.head_start_timeout_s + limits.worker_start_timeout_s)
    start += policies.longer_boot_s(limits)
    return ClusterData(
        state_since=now,
        started_at=now,
        phase_deadline=now + timedelta(seconds=start),
        bounds={g.name: Bounds(min_nodes=g.min_nodes, max_nodes=g.max_nodes) for g in request.config.worker_nodes},
        leases={request.made_for: now} if request.made_for else {},
    )
