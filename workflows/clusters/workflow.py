"""ClusterWorkflow: one per cluster, for its whole life.

Messages store what is wanted or what happened; ``_decide`` compares that with what there is and starts
what is missing; ``_flush`` tells the records and the lease holders. Nothing is periodic: between changes the
workflow sleeps on a condition and one timer, so a cluster to which nothing happens adds no event to its history.

Every step is guarded by state: a node entry is ``REQUESTED`` before its launch is asked for, and carries the
launch's token, so that continue-as-new, a replay or a lost answer never makes a second machine. The undo of a
launch is ``_end``: it ends by machine id, or by token where the launch's answer was lost.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from runtime.messages.clusters import OwnedMachine

with workflow.unsafe.imports_passed_through():
    from heliostat.models.agents import FactKind
    from heliostat.models.clusters import Activity, ClusterState, NodeRole, NodeState
    from heliostat.models.compute_configs import MAX_NODES_PER_CLUSTER
    from runtime.messages.clusters import (
        ClusterInput,
        HeadSilent,
        LeaseAnswer,
        LeaseRequest,
        LimitsUpdate,
        NodeFact,
        NodeRegistered,
        Release,
    )
    from runtime.messages.common import TerminateRequest
    from workflows.clusters.launching import ClusterNodes
    from workflows.clusters.progress import HEAD
    from workflows.entity.alarm import Deadline
    from workflows.entity.life import may_continue_as_new, shield
    from workflows.entity.seen import first_sight


@workflow.defn
class ClusterWorkflow(ClusterNodes):
    @workflow.init
    def __init__(self, request: ClusterInput) -> None:
        super().__init__(request)

    # --- what others say ----------------------------------------------------------------------------------

    @workflow.signal(description="A node's agent has called for the first time")
    def node_registered(self, message: NodeRegistered) -> None:
        node = self.s.nodes.get(message.node_id)
        if node is None or not node.live or not first_sight(self.s.seen, message.event_id):
            return
        node.ip = message.ip
        self._had(node)
        if node.state in (NodeState.REQUESTED, NodeState.LAUNCHED):
            node.state, node.registered_at = NodeState.REGISTERED, workflow.now()
        self._touch(node)

    @workflow.signal(description="Agents of several nodes have called for the first time")
    def nodes_registered(self, messages: list[NodeRegistered]) -> None:
        for message in messages:
            self.node_registered(message)

    @workflow.signal(description="A change that a node's agent saw")
    def fact(self, fact: NodeFact) -> None:
        if not first_sight(self.s.seen, fact.event_id):
            return
        subject = self.s.nodes.get(str(fact.data.get("node_id") or fact.node_id))
        reporter = self.s.nodes.get(fact.node_id)
        if subject is None or reporter is None or not reporter.live or not subject.live:
            return  # of a machine that we have given up: what it says no longer counts
        reason = str(fact.data.get("reason") or "")
        match fact.kind:
            case FactKind.RAY_READY:
                self._node_running(subject, fact)
            case FactKind.NODE_LOST:
                self._lose(subject, reason or "Ray lost it", failed=subject.state != NodeState.RUNNING)
            case FactKind.NODE_FAILED:
                self._lose(subject, reason or "Ray did not start on it", failed=True)
            case FactKind.STOPPING:
                if subject.role == NodeRole.HEAD and self.s.terminate is None:
                    self.s.terminate = TerminateRequest(actor=f"agent:{subject.id}", reason=reason)
                else:
                    self._lose(subject, reason, failed=False)
            case FactKind.ACTIVITY:
                told = str(fact.data.get("activity"))
                self.s.activity = Activity(told) if told in tuple(Activity) else Activity.UNKNOWN
                self.recorder.dirty = True
            case FactKind.DESIRED:
                self._desire(fact)
            case FactKind.SPOT_NOTICE:
                self._announced(subject, fact)
            case FactKind.RUN_RUNNING | FactKind.RUN_ENDED:
                return  # a job's business
        self.wake()

    @workflow.signal(description="Changes that a node's agent saw, in their order")
    def facts(self, facts: list[NodeFact]) -> None:
        for fact in facts:
            self.fact(fact)

    @workflow.signal(description="The monitor has not heard the head for too long")
    def head_silent(self, message: HeadSilent) -> None:
        head = self.s.head
        if head is not None and head.id == message.node_id and head.machine_id:
            self.steps.start("ask after head", partial(self._ask_after_head, head, message))
            self.wake()

    @workflow.signal(description="A holder needs the cluster no more")
    def release(self, message: Release) -> None:
        if self.s.leases.pop(message.holder, None) is not None:
            self.recorder.dirty = True
        if message.end and self.input.made_for == message.holder and self.s.terminate is None:
            self.s.terminate = TerminateRequest(actor=message.holder, reason=message.reason or "its job has ended")
        self.wake()

    @workflow.update(description="Take a lease; answered at once")
    def acquire(self, request: LeaseRequest) -> LeaseAnswer:
        if request.holder not in self.s.leases:
            self.s.leases[request.holder] = workflow.now()
            self.recorder.dirty = True
            self.wake()
        return self._answer()

    @acquire.validator
    def _may_acquire(self, request: LeaseRequest) -> None:
        if self.s.terminate is not None or self.s.phase.settled:
            raise ApplicationError(f"cluster {self.input.name} is ending: {self.s.reason}", type="cluster_failed")

    @workflow.update(description="End the cluster")
    def terminate(self, request: TerminateRequest) -> None:
        self._terminate(request)

    def _terminate(self, request: TerminateRequest) -> None:
        if self.s.terminate is None:
            self.s.terminate = request
            self.wake()

    @workflow.update(description="Change the bounds of a worker group")
    def set_limits(self, request: LimitsUpdate) -> None:
        """The head learns them from the records, in the answer of its next report."""
        bounds = self.s.bounds[request.group]
        if request.min_nodes is not None:
            bounds.min_nodes = request.min_nodes
        if request.max_nodes is not None:
            bounds.max_nodes = request.max_nodes
        text = f"{request.group}: {bounds.min_nodes} to {bounds.max_nodes} nodes"
        self.recorder.event("limits_changed", text, actor=request.actor)
        self.wake()

    @set_limits.validator
    def _may_set_limits(self, request: LimitsUpdate) -> None:
        bounds = self.s.bounds.get(request.group)
        if bounds is None:
            known = ", ".join(self.s.bounds) or "none"
            raise ApplicationError(
                f"cluster {self.input.name} has no worker group {request.group!r}; it has: {known}", type="not_found"
            )
        low = bounds.min_nodes if request.min_nodes is None else request.min_nodes
        high = bounds.max_nodes if request.max_nodes is None else request.max_nodes
        if low > high:
            raise ApplicationError(f"min_nodes ({low}) is greater than max_nodes ({high})", type="invalid_request")
        if high < 1:
            raise ApplicationError(
                "max_nodes must be at least 1; min_nodes 0 lets a group shrink to none", type="invalid_request"
            )
        total = high + sum(b.max_nodes for g, b in self.s.bounds.items() if g != request.group)
        if total > MAX_NODES_PER_CLUSTER:
            raise ApplicationError(
                f"max_nodes would add up to {total}; one cluster may have {MAX_NODES_PER_CLUSTER}",
                type="invalid_request",
            )
        if self.s.terminate is not None or self.s.phase.settled:
            raise ApplicationError(f"cluster {self.input.name} is ending", type="conflict")

    @workflow.query(description="Machines that this workflow owns; the sweep spares them")
    def owned(self) -> list[OwnedMachine]:
        return [
            OwnedMachine(node_id=n.id, machine_id=n.machine_id, token=n.token)
            for n in self.s.nodes.values()
            if n.state != NodeState.TERMINATED
        ]

    # --- the life -----------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, _: ClusterInput) -> str:
        await shield(self._live(), self._terminate)
        return "withdrawn" if self._withdrawn else f"{self.s.phase}: {self.s.reason}"

    async def _live(self) -> None:
        # An end that the records have not taken is told until they have.
        while not self._withdrawn and (self.recorder.dirty or not self.s.phase.settled):
            self.wake.clear()
            self.steps.raise_bug()
            if not self.s.phase.settled:
                self._decide()
            if self.recorder.dirty and not self.recorder.held:
                await self._flush()
                continue
            if may_continue_as_new(self.recorder, busy=bool(self.steps.running)):
                workflow.continue_as_new(
                    self.input.model_copy(update={"state": self.s.model_dump(mode="json")}),
                )
            self.alarm.set(self._deadlines())
            await self.wake.wait()

    def _decide(self) -> None:
        """Compares wanted with observed; everything that takes time becomes a task."""
        now = workflow.now()
        if self.s.terminate is None:
            self._check_deadlines(now)
        if self.s.terminate is not None and self.s.phase != ClusterState.TERMINATING:
            self._begin_end()
        if self.s.phase == ClusterState.TERMINATING:
            for node in self.s.nodes.values():
                if node.live:
                    self._give_up(node, "the cluster ends")
        else:
            self._check_nodes(now)
            self._want_head(now)
            self._want_workers(now)
            self._check_ready(now)
            self._check_idle(now)
        self._start_launches(now)
        self._start_ends()
        over = self.s.phase == ClusterState.TERMINATING and not self._unended() and not self.steps.running
        if over and self.s.keeps:
            self.steps.start("release", self._release)
        elif over:
            reason = self.s.terminate.reason if self.s.terminate else ""
            self._enter(self.s.end_state, reason or self.s.reason)

    def _want_head(self, now: datetime) -> None:
        if self.s.head is None and self._ended_heads():
            self._new_node(NodeRole.HEAD, HEAD, now)

    def _ended_heads(self) -> bool:
        """The old head's machine is gone: two heads of one cluster must never live at once."""
        return all(n.role != NodeRole.HEAD or n.state == NodeState.TERMINATED for n in self.s.nodes.values())

    def _want_workers(self, now: datetime) -> None:
        # Workers boot beside the head and wait for its address; while a lost head is fenced there is none to join.
        if self.s.head is None:
            return
        for group in self.s.bounds:
            for node in self.s.surplus(group):
                self._give_up(node, "not wanted any more")
            for _ in range(self.s.wanted(group) - len(self.s.staying(group))):
                self._new_node(NodeRole.WORKER, group, now)
        self.s.remove = [node_id for node_id in self.s.remove if node_id in self.s.nodes]

    # --- deadlines ----------------------------------------------------------------------------------------

    def _deadlines(self) -> list[Deadline]:
        found: list[tuple[datetime | None, str]] = [(self.recorder.retry_at, "write the records again")]
        if self.s.phase != ClusterState.TERMINATING:
            found += [
                (self.s.phase_deadline, f"deadline of {self.s.phase}"),
                (self.s.uptime_deadline(self.config), "maximum uptime"),
                (self.s.idle_deadline(self.config), "idle shutdown"),
                (self._lease_check_due(), "check the leases"),
            ]
            for node in self.s.nodes.values():
                name = f"{node.group} node {node.slot}.{node.generation}"
                found.append((self._node_deadline(node), f"deadline of {name}"))
                if node.role == NodeRole.HEAD and node.live and node.machine_id:
                    found.append((node.taken_at, "the head's machine should be gone"))
                if node.state == NodeState.REQUESTED:
                    found.append((node.not_before, f"back-off before {name}"))
        return [(at, why) for at, why in found if at is not None]
