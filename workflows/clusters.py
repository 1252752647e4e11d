"""ClusterWorkflow: one per cluster, for its whole life.

Messages store what is wanted or what happened; ``_decide`` compares that with what there is and starts
what is missing; ``_flush`` tells the records and the lease holders. Nothing is periodic: between changes the
workflow sleeps on a condition and one timer, so a cluster to which nothing happens adds no event to its history.

Every step is guarded by state: a node entry is ``REQUESTED`` before its launch is asked for, and carries the
launch's token, so that continue-as-new, a replay or a lost answer never makes a second machine. The undo of a
launch is ``_end``: it ends by machine id, or by token where the launch's answer was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandActivities, CommandRequest
    from activities.leases import LeaseActivities
    from activities.nodes import EndNodes, HandOver, LaunchNode, MachineRefs, NodeActivities
    from activities.records import ClusterRecord, RecordActivities
    from clouds.base import Machine, MachineState
    from clouds.keeps import Keep
    from heliostat.models.agents import CommandKind, FactKind, GroupConfig
    from heliostat.models.clouds import Market
    from heliostat.models.clusters import Activity, ClusterState, NodeRole, NodeState
    from heliostat.models.common import Event, EventLevel, Model
    from heliostat.models.compute_configs import MAX_NODES_PER_CLUSTER, NodeConfig
    from runtime.messages import (
        ClusterInput,
        ClusterNotice,
        HeadSilent,
        LeaseAnswer,
        LeaseRequest,
        LimitsUpdate,
        NodeFact,
        NodeRegistered,
        Release,
        TerminateRequest,
    )
    from workflows import ids, policies
    from workflows.cluster_state import Bounds, ClusterData, NodeEntry, Place, desired_of, moment_of, resources_of
    from workflows.cluster_view import cluster_details, cluster_resource, node_resource

STATE = SearchAttributeKey.for_keyword("HeliostatState")

HEAD = "head"
CAPACITY = ("no_capacity", "not_offered", "quota_exceeded")
"""Launch failures that another place may not have."""
HOPELESS = ("bad_config", "denied")
"""Launch failures that no later try cures: the cluster can't be as it was asked for."""


class OwnedMachine(Model):
    node_id: str
    machine_id: str | None
    token: str


@workflow.defn
class ClusterWorkflow:
    @workflow.init
    def __init__(self, request: ClusterInput) -> None:
        self.input = request
        self.config = request.config
        now = workflow.now()
        if request.state is not None:
            self.s = ClusterData.model_validate(request.state)
        else:
            limits = request.limits
            start = max(limits.capacity_timeout_s, limits.head_start_timeout_s + limits.worker_start_timeout_s)
            start += policies.longer_boot_s(limits)
            self.s = ClusterData(
                state_since=now,
                started_at=now,
                phase_deadline=now + timedelta(seconds=start),
                bounds={g.name: Bounds(min_nodes=g.min_nodes, max_nodes=g.max_nodes) for g in self.config.worker_nodes},
                leases={request.made_for: now} if request.made_for else {},
            )
        self._dirty = request.state is None
        self._withdrawn = False
        self._changed: dict[str, None] = {}
        self._events: list[Event] = []
        self._woken = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._alarm_at: datetime | None = None
        self._alarm: asyncio.Task[None] | None = None
        self._retry_flush_at: datetime | None = None
        self._unwritten = 0
        # Nobody is told what it knows: a job that makes a cluster knows that it starts, and one run of the workflow
        # ends only when all was told.
        self._fencing = False
        self._told = self._news()
        self._shown_state = "" if request.state is not None else ClusterState.STARTING.value
        self._bug: Exception | None = None

    # --- what others say ----------------------------------------------------------------------------------

    @workflow.signal(description="A node's agent has called for the first time")
    def node_registered(self, message: NodeRegistered) -> None:
        node = self.s.nodes.get(message.node_id)
        if node is None or not node.live or not self.s.first_sight(message.event_id):
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
        if not self.s.first_sight(fact.event_id):
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
                self._dirty = True
            case FactKind.DESIRED:
                self._desire(fact)
            case FactKind.SPOT_NOTICE:
                self._announced(subject, fact)
            case FactKind.RUN_RUNNING | FactKind.RUN_ENDED:
                return  # a job's business
        self._wake()

    @workflow.signal(description="Changes that a node's agent saw, in their order")
    def facts(self, facts: list[NodeFact]) -> None:
        for fact in facts:
            self.fact(fact)

    @workflow.signal(description="The monitor has not heard the head for too long")
    def head_silent(self, message: HeadSilent) -> None:
        head = self.s.head
        if head is not None and head.id == message.node_id and head.machine_id:
            self._start("ask after head", self._ask_after_head(head, message))
            self._wake()

    @workflow.signal(description="A holder needs the cluster no more")
    def release(self, message: Release) -> None:
        if self.s.leases.pop(message.holder, None) is not None:
            self._dirty = True
        if message.end and self.input.made_for == message.holder and self.s.terminate is None:
            self.s.terminate = TerminateRequest(actor=message.holder, reason=message.reason or "its job has ended")
        self._wake()

    @workflow.update(description="Take a lease; answered at once")
    def acquire(self, request: LeaseRequest) -> LeaseAnswer:
        if request.holder not in self.s.leases:
            self.s.leases[request.holder] = workflow.now()
            self._dirty = True
            self._wake()
        return self._answer()

    @acquire.validator
    def _may_acquire(self, request: LeaseRequest) -> None:
        if self.s.terminate is not None or self.s.phase.settled:
            raise ApplicationError(f"cluster {self.input.name} is ending: {self.s.reason}", type="cluster_failed")

    @workflow.update(description="End the cluster")
    def terminate(self, request: TerminateRequest) -> None:
        if self.s.terminate is None:
            self.s.terminate = request
            self._wake()

    @workflow.update(description="Change the bounds of a worker group")
    def set_limits(self, request: LimitsUpdate) -> None:
        """The head learns them from the records, in the answer of its next report."""
        bounds = self.s.bounds[request.group]
        if request.min_nodes is not None:
            bounds.min_nodes = request.min_nodes
        if request.max_nodes is not None:
            bounds.max_nodes = request.max_nodes
        text = f"{request.group}: {bounds.min_nodes} to {bounds.max_nodes} nodes"
        self._event("limits_changed", text, actor=request.actor)
        self._wake()

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
        # A cancel from the UI reaches this await alone: a step that it cut off in the middle (a launch, a write of
        # the records) could not be undone. It means the same as a terminate, for machines must be ended either way.
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
        return "withdrawn" if self._withdrawn else f"{self.s.phase}: {self.s.reason}"

    async def _live(self) -> None:
        # An end that the records have not taken is told until they have.
        while not self._withdrawn and (self._dirty or not self.s.phase.settled):
            self._woken = False
            if self._bug is not None:
                raise self._bug
            if not self.s.phase.settled:
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
        over = self.s.phase == ClusterState.TERMINATING and not self._unended() and not self._tasks
        if over and self.s.keeps:
            self._start("release", self._release())
        elif over:
            reason = self.s.terminate.reason if self.s.terminate else ""
            self._enter(self.s.end_state, reason or self.s.reason)

    # --- starting and healing -----------------------------------------------------------------------------

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

    def _new_node(self, role: NodeRole, group: str, now: datetime) -> None:
        slot = self.s.take_slot(group)
        generation = self.s.generations[str(slot)]
        failures = self.s.failures.get(group, 0)
        places = self._places(group)
        place, at = self.s.pick(places, now)
        # Every place is tried once before the back-off begins; a group whose nodes die young waits in any case.
        wait = policies.backoff(max(failures // len(places), self.s.deaths.get(group, 0)))
        if wait:
            at = max(now + wait, at or now)
        node = NodeEntry(
            id=ids.node_id(self.input.cluster_id, slot, generation),
            role=role,
            group=group,
            slot=slot,
            generation=generation,
            token=ids.launch_token(self.input.cluster_id, slot, generation),
            zone=place.zone,
            market=place.market,
            instance_type=place.instance_type,
            kept=place.kept,
            created_at=now,
            not_before=at,
        )
        self.s.nodes[node.id] = node
        self._touch(node)

    def _places(self, group: str) -> list[Place]:
        """Where a node of this group may be launched, in the configured order: each zone with each type, and all of
        that again as the market falls back. Failures that are not for a lack of machines go through them too: one
        zone's network may be at fault."""
        config = self._node_config(group)
        wanted = getattr(config, "market_type", Market.ON_DEMAND)
        markets = [Market.SPOT, Market.ON_DEMAND] if wanted == Market.PREFER_SPOT else [wanted]
        zones: list[str | None] = [*self.config.zones] if self.config.zones else [None]
        kept = group == HEAD and bool(self.config.head_node.keeps)
        if kept and self.s.kept_in:
            zones = [self.s.kept_in]
        types: list[str | None] = [*config.instance_types] if config.instance_types else [config.instance_type]
        places = [Place(zone=z, market=m, instance_type=t, kept=kept) for m in markets for z in zones for t in types]
        first = self.s.failures.get(group, 0) % len(places)
        return places[first:] + places[:first]

    def _start_launches(self, now: datetime) -> None:
        for node in self.s.nodes.values():
            due = node.not_before is None or node.not_before <= now
            if node.state == NodeState.REQUESTED and node.boot is not None and due and not node.launching:
                node.launching = node.asked = True
                node.asked_at = now
                self.s.keeps = self.s.keeps or node.kept
                self._start(f"launch {node.id}", self._launch(node))

    async def _launch(self, node: NodeEntry) -> None:
        """Undo: ``_end``, by token where the answer was lost."""
        config = self._node_config(node.group)
        resources = resources_of(config)
        required = config.required_resources
        assert node.boot is not None
        request = LaunchNode(
            cloud_id=self.input.cloud_id,
            cluster_id=self.input.cluster_id,
            node_id=node.id,
            generation=node.generation,
            role=node.role,
            token=node.token,
            boot=node.boot,
            instance_type=node.instance_type or config.instance_type,
            cpu=required.CPU if required else resources.get("CPU"),
            memory=required.memory if required else None,
            gpu=required.GPU if required else int(resources.get("GPU", 0)),
            zone=node.zone,
            market=node.market,
            tags=self.input.tags,
            accelerator=required.accelerator if required else None,
            cpu_architecture=required.cpu_architecture if required else None,
            advanced=config.advanced_instance_config,
            keep=Keep.of(self.config.head_node, had=self.s.kept_in is not None) if node.kept else None,
        )
        launch = workflow.start_activity_method(
            NodeActivities.launch_node,
            request,
            summary=f"launch {node.group} node, slot {node.slot}, generation {node.generation}",
            # A launch that waits for its next try is given up at once; one that is being tried is waited for, since
            # what it makes must be ended too.
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            **policies.LAUNCH,
        )
        try:
            await workflow.wait_condition(lambda: launch.done() or not node.live)
            if not launch.done():
                launch.cancel()
            machine: Machine = await launch
        except (ActivityError, asyncio.CancelledError) as error:
            node.launching = False
            if is_cancelled_exception(error):
                return
            cause = error.__cause__
            code = cause.type if isinstance(cause, ApplicationError) else None
            message = getattr(cause, "message", None) or str(cause or error)
            self._launch_failed(node, code or "unknown", message)
            return
        node.launching = False
        node.machine_id = machine.machine_id
        node.ip = node.ip or machine.ip
        node.launched_at = workflow.now()
        self.s.shortages.pop(node.place.key, None)
        if machine.state == MachineState.GONE and node.live:
            self._lose(node, machine.reason or "its machine has ended", failed=True)
        elif node.state == NodeState.REQUESTED:
            node.state = NodeState.LAUNCHED
        self._had(node)
        if node.kept and node.live:
            self._start(f"hand over to {node.id}", self._hand_over(node))
        self._touch(node)

    def _had(self, node: NodeEntry) -> None:
        """What it wrote is what the next head must find."""
        if node.kept and self.s.kept_in is None:
            self.s.kept_in = node.zone or ""

    async def _hand_over(self, node: NodeEntry) -> None:
        """Undo: the machine's end takes the disk off it, ``_release`` deletes it."""
        what = HandOver(cloud_id=self.input.cloud_id, cluster_id=self.input.cluster_id, machine_id=node.machine_id)
        step = workflow.start_activity_method(
            NodeActivities.hand_over,
            what,
            summary=f"give the head, generation {node.generation}, what it keeps",
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            **policies.HAND_OVER,
        )
        await workflow.wait_condition(lambda: step.done() or not node.live)
        try:
            if not step.done():
                step.cancel()
            await step
        except (ActivityError, asyncio.CancelledError) as error:
            if is_cancelled_exception(error) or not node.live:
                return
            cause = error.__cause__
            self._lose(node, f"it could not be given what it keeps: {getattr(cause, 'message', cause)}", failed=True)
            if isinstance(cause, ApplicationError) and cause.type in HOPELESS and not self.s.ready:
                self._fail(node.reason)

    async def _release(self) -> None:
        await workflow.execute_activity_method(
            NodeActivities.hand_over,
            HandOver(cloud_id=self.input.cloud_id, cluster_id=self.input.cluster_id),
            summary="delete what the heads have kept",
            **policies.RELEASE_KEPT,
        )
        self.s.keeps = False

    def _launch_failed(self, node: NodeEntry, code: str, message: str) -> None:
        if code in CAPACITY and workflow.patched("places"):
            self._no_machine(node, code, message)
            return
        self._event(
            "launch_failed", f"{node.group} node {node.slot}.{node.generation}: {message}", level=EventLevel.WARNING
        )
        self.s.failures[node.group] = self.s.failures.get(node.group, 0) + 1
        self.s.cause = code
        self.s.condition("CapacityAvailable", False, workflow.now(), code, message)
        if node.live:
            self._give_up(node, message)
        if code in HOPELESS and self.s.phase in (ClusterState.STARTING, ClusterState.RECOVERING):
            self._fail(message)
        self._say_waits()

    def _no_machine(self, node: NodeEntry, code: str, message: str) -> None:
        """The next try goes to the next place; only when all are short does it wait."""
        now, places = workflow.now(), self._places(node.group)
        # A quota is of a type and market, in all zones.
        alike = [p for p in places if (p.market, p.instance_type) == (node.market, node.instance_type)]
        here = alike if code == "quota_exceeded" else [node.place]
        news = self.s.short(here, node.asked_at or now, now, final=code == "not_offered")
        place, at = self.s.pick(places, now)
        hopeless = self.s.hopeless(places)
        then = "nowhere else to try" if hopeless else f"trying {place}" + (f" at {at:%H:%M:%S} UTC" if at else "")
        said = f"{node.place}: {message} ({code}); {then}"
        if news:  # of many at once, the first one
            text = f"{node.group} node {node.slot}.{node.generation}: {said}"
            self._event("launch_failed", text, level=EventLevel.WARNING)
        self.s.cause = code
        self.s.condition("CapacityAvailable", False, now, code, said)
        if node.live:
            self._give_up(node, f"{node.place}: {message}")
        if hopeless and self.s.phase in (ClusterState.STARTING, ClusterState.RECOVERING):
            self._fail(f"no zone of the cloud offers the instance types of {node.group}: {message}")
        self._say_waits()

    def _node_running(self, node: NodeEntry, fact: NodeFact) -> None:
        if node.state == NodeState.RUNNING:
            return
        node.state, node.running_at = NodeState.RUNNING, workflow.now()
        self.s.failures.pop(node.group, None)
        self.s.condition("CapacityAvailable", True, workflow.now())
        if node.role == NodeRole.HEAD:
            self.s.head_running_at = workflow.now()
            self.s.head_generation = node.generation
            self.s.ray_version = str(fact.data.get("ray_version") or "") or self.s.ray_version
            self.s.condition("HeadReady", True, workflow.now())
        self._event("node_running", f"{node.group} node {node.slot}.{node.generation} ({node.ip})")
        self._touch(node)

    def _check_nodes(self, now: datetime) -> None:
        for node in list(self.s.nodes.values()):
            due = self._node_deadline(node)
            if node.role == NodeRole.HEAD and node.live and node.machine_id and node.taken_at and now >= node.taken_at:
                node.taken_at = None  # if it is still there, its silence will tell
                silent = HeadSilent(event_id=f"{node.id}/taken", node_id=node.id, since=now)
                self._start("ask after head", self._ask_after_head(node, silent))
            if due is not None and now >= due:
                self._lose(node, f"{self._missed(node)} by its deadline ({due:%H:%M:%S} UTC)", failed=True)

    def _node_deadline(self, node: NodeEntry) -> datetime | None:
        """By when the node must be one step further; None while it waits for something else."""
        limits = self.input.limits
        seconds = limits.head_start_timeout_s if node.role == NodeRole.HEAD else limits.worker_start_timeout_s
        if node.state == NodeState.LAUNCHED and node.launched_at:
            return node.launched_at + timedelta(seconds=limits.register_timeout_s or seconds)
        if node.state == NodeState.REGISTERED and node.registered_at:
            if node.role == NodeRole.HEAD:
                return node.registered_at + timedelta(seconds=seconds)
            if self.s.head_running_at:
                return max(node.registered_at, self.s.head_running_at) + timedelta(seconds=seconds)
        return None

    def _missed(self, node: NodeEntry) -> str:
        """What did not come in time, and by which setting."""
        role = "HEAD" if node.role == NodeRole.HEAD else "WORKER"
        if node.state != NodeState.LAUNCHED:
            return f"brought up no Ray after its registration (HELIOSTAT_{role}_START_TIMEOUT_S)"
        limit = "REGISTER" if self.input.limits.register_timeout_s else f"{role}_START"
        return f"did not register after its launch (HELIOSTAT_{limit}_TIMEOUT_S)"

    def _announced(self, node: NodeEntry, fact: NodeFact) -> None:
        """A worker's replacement is asked for at once, beside it. Two heads must never live at once: a head's follows
        when its machine is gone, which the cloud is asked about as soon as it should be."""
        kind, at = str(fact.data.get("kind")), moment_of(fact.data.get("deadline"))
        if node.taken_at is None:
            node.taken_at = at
        by = f" by {at:%H:%M:%S} UTC" if at else ""
        node.notice = str(fact.data.get("reason") or f"the cloud takes it back{by}")[:300]
        text = f"{node.group} node {node.slot}.{node.generation}: {node.notice} ({kind})"
        self._event("spot_notice", text, level=EventLevel.WARNING, actor=f"agent:{fact.node_id}")
        self._touch(node)

    def _lose(self, node: NodeEntry, reason: str, *, failed: bool) -> None:
        """A node is no more, or no use. Its machine is ended all the same; the slot is filled again."""
        if not node.live:
            return
        self._event("node_lost", f"{node.group} node {node.slot}.{node.generation}: {reason}", level=EventLevel.WARNING)
        if node.notice:
            pass  # the cloud has taken it, which tells nothing of what runs on it
        elif failed:
            self.s.failures[node.group] = self.s.failures.get(node.group, 0) + 1
        elif node.running_at is not None:
            young = workflow.now() - node.running_at < policies.YOUNG
            self.s.deaths[node.group] = self.s.deaths.get(node.group, 0) + 1 if young else 0
        self._give_up(node, reason)
        if node.role == NodeRole.HEAD:
            self._head_lost(reason)

    def _head_lost(self, reason: str) -> None:
        """All that ran is gone with it: workers of a head without fault tolerance can't join another."""
        now = workflow.now()
        for worker in self.s.workers():
            self._give_up(worker, "its head is lost")
        self.s.desired, self.s.remove = {}, []
        self.s.activity, self.s.idle_since = Activity.UNKNOWN, None
        self.s.head_running_at = None
        self.s.condition("HeadReady", False, now, "HeadLost", reason)
        if self.s.phase not in (ClusterState.RUNNING, ClusterState.RECOVERING) or self.s.terminate is not None:
            return
        self.s.head_losses = [t for t in self.s.head_losses if now - t < policies.RECOVERIES_WITHIN] + [now]
        if len(self.s.head_losses) > policies.RECOVERIES_MAX:
            minutes = policies.RECOVERIES_WITHIN.total_seconds() / 60
            self._fail(f"head lost {len(self.s.head_losses)} times within {minutes:.0f} minutes, last: {reason}")
        elif self.s.phase == ClusterState.RUNNING:
            limits = self.input.limits
            seconds = limits.capacity_timeout_s + policies.longer_boot_s(limits)
            self.s.phase_deadline = now + timedelta(seconds=seconds)
            self._enter(ClusterState.RECOVERING, f"head lost: {reason}")

    async def _ask_after_head(self, head: NodeEntry, message: HeadSilent) -> None:
        """Silence is not death: the cloud is asked, and a head that runs gets more time."""
        assert head.machine_id is not None
        machines: list[Machine] = await workflow.execute_activity_method(
            NodeActivities.describe_machines,
            MachineRefs(cloud_id=self.input.cloud_id, machine_ids=[head.machine_id]),
            summary="head silent: ask the cloud after its machine",
            **policies.DESCRIBE,
        )
        found = machines[0] if machines else None
        if found is None or found.state in (MachineState.GONE, MachineState.STOPPING):
            self._lose(head, (found.reason if found else "") or "its machine is gone", failed=False)
        elif head.state != NodeState.RUNNING:
            pass  # it boots: its own deadline says for how long it may
        elif message.silent_s >= policies.HEAD_SILENCE.total_seconds() and not message.mass:
            self._lose(head, f"silent since {message.since:%H:%M:%S} UTC though its machine runs", failed=False)
        self._wake()

    def _check_ready(self, now: datetime) -> None:
        head = self.s.head
        starting = self.s.phase in (ClusterState.STARTING, ClusterState.RECOVERING)
        if not starting or head is None or head.state != NodeState.RUNNING or not self.s.workers_ready():
            self._say_waits()
            return
        before = self.s.state_since
        marks = {
            "head_launched": head.launched_at or head.registered_at,
            "head_registered": head.registered_at,
            "head_ready": head.running_at,
            "workers_ready": now,
        }
        self.s.phase_seconds = {}
        for phase, at in marks.items():
            if at is not None:
                self.s.phase_seconds[phase] = round(max((at - before).total_seconds(), 0), 3)
                before = max(at, before)
        self.s.phase_deadline = None
        self.s.cause = ""
        self._enter(ClusterState.RUNNING, "head and workers are up")
        self._event("cluster_ready", f"ready after {sum(self.s.phase_seconds.values()):.1f} s")

    def _desire(self, fact: NodeFact) -> None:
        """Absolute counts from Ray's autoscaler; our bounds hold here, not there."""
        wanted, remove = desired_of(fact.data)
        wanted = {g: n for g, n in wanted.items() if g in self.s.bounds}
        remove = [n for n in remove if n in self.s.nodes]
        if wanted != self.s.desired or remove:
            text = ", ".join(f"{g} {n}" for g, n in sorted(wanted.items()))
            self._event("scale", f"autoscaler wants {text}", actor=f"agent:{fact.node_id}")
        self.s.desired = wanted
        self.s.remove += [n for n in remove if n not in self.s.remove]

    # --- ending -------------------------------------------------------------------------------------------

    def _check_deadlines(self, now: datetime) -> None:
        up = self.s.uptime_deadline(self.config)
        if up is not None and now >= up:
            minutes = self.config.maximum_uptime_minutes
            self.s.terminate = TerminateRequest(actor="cluster", reason=f"maximum uptime of {minutes:g} minutes")
        elif self.s.phase_deadline is not None and now >= self.s.phase_deadline:
            self._fail(f"not ready by its deadline; it waited for: {self.s.waits_for or 'its head'}")

    def _check_idle(self, now: datetime) -> None:
        held = bool(self.s.leases) or self.s.activity != Activity.IDLE or self.s.phase != ClusterState.RUNNING
        if held:
            self.s.idle_since = None
        elif self.s.idle_since is None:
            self.s.idle_since = now
        due = self.s.idle_deadline(self.config)
        head = self.s.head
        if due is not None and now >= due and head is not None:
            self._start("idle shutdown", self._idle_shutdown(head))
        check = self._lease_check_due()
        if check is not None and now >= check:
            self._start("lease check", self._check_leases())

    async def _idle_shutdown(self, head: NodeEntry) -> None:
        """Fence first, then ask once more: work that slipped in between is work, and unknown counts as busy."""
        self._fencing = True
        try:
            seen = await self._command(head, CommandKind.FENCE, {}, policies.FENCE_TIMEOUT)
            if self.s.terminate is not None or self.s.head is not head:
                return
            if seen is not None and seen.get("activity") == Activity.IDLE and not self.s.leases:
                minutes = self.config.idle_termination_minutes
                self.s.terminate = TerminateRequest(actor="idle shutdown", reason=f"idle for {minutes:g} minutes")
                return
            await self._command(head, CommandKind.UNFENCE, {}, policies.FENCE_TIMEOUT)
            self.s.idle_since = workflow.now()  # ask again after another idle period
        finally:
            self._fencing = False
            self._dirty = True  # whoever took a lease meanwhile was told to wait, and is now told to go on

    def _lease_check_due(self) -> datetime | None:
        """A lease held for longer than the idle limit: does its holder's workflow still run?"""
        since = [t for h, t in self.s.leases.items() if not h.startswith("user:")]
        if not since or not self.config.idle_termination_minutes:
            return None
        last = max([min(since), *filter(None, [self.s.leases_checked_at])])
        return last + timedelta(minutes=self.config.idle_termination_minutes)

    async def _check_leases(self) -> None:
        holders = [h for h in self.s.leases if not h.startswith("user:")]
        self.s.leases_checked_at = workflow.now()
        ended: list[str] = await workflow.execute_activity_method(
            LeaseActivities.ended_holders, holders, summary="do the lease holders still run?", **policies.LEASE
        )
        for holder in ended:
            if self.s.leases.pop(holder, None) is not None:
                self._event("lease_dropped", f"{holder} no longer runs", level=EventLevel.WARNING)

    def _fail(self, reason: str) -> None:
        if self.s.terminate is None:
            self.s.end_state = ClusterState.FAILED
            self.s.cause = self.s.cause or "cluster_failed"
            self.s.terminate = TerminateRequest(actor="cluster", reason=reason)

    def _begin_end(self) -> None:
        assert self.s.terminate is not None
        if self.s.end_state == ClusterState.TERMINATED:
            self.s.cause = "terminated"
        self.s.phase_deadline = None
        self._enter(ClusterState.TERMINATING, self.s.terminate.reason or "asked to end", self.s.terminate.actor)
        self.s.waits_for = "the cloud to confirm that the machines are gone"

    def _give_up(self, node: NodeEntry, reason: str) -> None:
        node.state, node.reason = NodeState.TERMINATING, reason
        self.s.free_slot(node)
        self._touch(node)

    def _unended(self) -> list[NodeEntry]:
        return [n for n in self.s.nodes.values() if n.state != NodeState.TERMINATED]

    def _start_ends(self) -> None:
        """One batch for all that wait; a launch under way is waited for, its machine would be missed."""
        due = []
        for node in self._unended():
            if node.state != NodeState.TERMINATING or node.launching or node.ending:
                continue
            if node.asked:
                due.append(node)
            else:
                self._ended(node)
        if due:
            for node in due:
                node.ending = True
            self._start(f"end {due[0].id}", self._end(due))

    async def _end(self, nodes: list[NodeEntry]) -> None:
        if self.s.terminate is None or self.s.end_state == ClusterState.FAILED:
            silent = [n for n in nodes if n.machine_id and n.registered_at is None and n.launched_at]
            for node in silent[:3]:
                await self._keep_console(node)
        try:
            await workflow.execute_activity_method(
                NodeActivities.end_machines,
                EndNodes(
                    cloud_id=self.input.cloud_id,
                    machine_ids=[n.machine_id for n in nodes if n.machine_id],
                    tokens=[n.token for n in nodes if not n.machine_id],
                ),
                summary=f"end {len(nodes)} machine{'s' * (len(nodes) != 1)} and wait until gone",
                **policies.END_MACHINES,
            )
        except ActivityError:
            for node in nodes:
                node.ending = False
            raise
        for node in nodes:
            self._ended(node)

    async def _keep_console(self, node: NodeEntry) -> None:
        """Why a machine never called is only on its console, and the console goes with the machine."""
        assert node.machine_id is not None
        try:
            text: str = await workflow.execute_activity_method(
                NodeActivities.console_output,
                MachineRefs(cloud_id=self.input.cloud_id, machine_ids=[node.machine_id]),
                summary="keep the console of a node that never called",
                **policies.DESCRIBE,
            )
        except ActivityError as error:
            text = f"(console not readable: {error.cause or error})"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            self._event("console", text, level=EventLevel.WARNING)
            node.reason = f"{node.reason}; its console ends with: {lines[-1][:200]}"

    def _ended(self, node: NodeEntry) -> None:
        node.state, node.ended_at = NodeState.TERMINATED, workflow.now()
        self._touch(node)

    # --- telling ------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Writes the projection and tells the lease holders what changed for them."""
        self._dirty = False
        self.s.revision += 1
        changed = [self.s.nodes[i] for i in self._changed if i in self.s.nodes]
        ended = [n.id for n in changed if n.state == NodeState.TERMINATED]
        events, self._events, self._changed = self._events, [], {}
        for index, event in enumerate(events):
            event.id = ids.event_id(self.input.cluster_id, self.s.revision, index)
        record = ClusterRecord(
            cluster=cluster_resource(self.input, self.s),
            nodes=[node_resource(self.input.cluster_id, n) for n in changed],
            node_configs={
                n.id: {**self._group_config(n.group).model_dump(mode="json")} for n in changed if n.boot is None
            },
            cloud_id=self.input.cloud_id,
            events=events,
        )
        workflow.set_current_details(cluster_details(self.input, self.s))
        if self._shown_state != self.s.phase:
            self._shown_state = self.s.phase
            workflow.upsert_search_attributes([STATE.value_set(str(self.s.phase))])
        notice = asyncio.create_task(self._tell_holders())
        try:
            recorded = await workflow.execute_local_activity_method(
                RecordActivities.record_cluster, record, summary=f"record {self.s.phase}", **policies.RECORD
            )
        except FailureError:  # see policies.RECORD
            # Nothing may be lost: the next flush carries it all again, under a greater revision.
            self._dirty = True
            self._changed = {**dict.fromkeys(n.id for n in changed), **self._changed}
            self._events = events + self._events
            self._unwritten += 1
            wait = policies.rewrite_after(self._unwritten)
            workflow.logger.error("records out of reach, writing again in %d s", wait.total_seconds())
            self._retry_flush_at = workflow.now() + wait
            return
        finally:
            await notice
        self._retry_flush_at, self._unwritten = None, 0
        if not recorded.wanted:
            if not self.s.keeps and not any(n.asked for n in self.s.nodes.values()):
                self._withdrawn = True
                return
            # The row is gone for good (records restored from before it): nobody can reach this cluster any more.
            if self.s.terminate is None:
                self.s.terminate = TerminateRequest(actor="records", reason="the records do not know this cluster")
        for node in changed:
            node.boot = node.boot or recorded.boot
        for node_id in ended:  # not those that ended meanwhile: the records have not heard of it
            self.s.nodes.pop(node_id, None)

    def _flush_is_held(self) -> bool:
        return self._retry_flush_at is not None and workflow.now() < self._retry_flush_at

    def _news(self) -> tuple[object, ...]:
        """What a holder acts on. A new head is news once it can be used, not when it is up and its workers aren't."""
        ready = self.s.ready and not self._fencing
        head = self.s.head
        return self.s.phase, ready, self.s.head_generation if ready else None, head.notice if head else ""

    async def _tell_holders(self) -> None:
        news = self._news()
        if news == self._told:
            return
        self._told = news
        notice = ClusterNotice(**self._answer().model_dump(), event_id=f"{self.input.cluster_id}/{self.s.revision}")
        for holder in [h for h in self.s.leases if not h.startswith("user:")]:
            try:
                await workflow.get_external_workflow_handle(holder).signal("cluster_changed", notice)
            except ApplicationError as error:
                if error.type == "ExternalWorkflowExecutionNotFound":
                    self.s.leases.pop(holder, None)  # it has ended without a word: nobody holds this lease
                    self._dirty = True
                else:
                    workflow.logger.error("lease holder %s could not be told: %s", holder, error)

    def _answer(self) -> LeaseAnswer:
        head = self.s.head
        return LeaseAnswer(
            cluster_id=self.input.cluster_id,
            state=self.s.phase,
            ready=self.s.ready and not self._fencing and head is not None,
            head_node_id=head.id if head else None,
            head_generation=self.s.head_generation,
            reason=self.s.reason,
            cause=self.s.cause,
            revision=self.s.revision,
            notice=head.notice if head else "",
        )

    def _enter(self, phase: ClusterState, reason: str, actor: str = "") -> None:
        self.s.phase, self.s.reason, self.s.state_since = phase, reason, workflow.now()
        self.s.waits_for = ""
        level = EventLevel.ERROR if phase == ClusterState.FAILED else EventLevel.INFO
        self._event("state", f"{phase}: {reason}", level=level, actor=actor)

    def _event(self, kind: str, message: str, *, level: EventLevel = EventLevel.INFO, actor: str = "") -> None:
        self._dirty = True
        self._events.append(
            Event(
                id="",
                resource_id=self.input.cluster_id,
                at=workflow.now(),
                level=level,
                kind=kind,
                actor=actor or self.input.cluster_id,
                message=message,
            )
        )

    def _say_waits(self) -> None:
        if self.s.phase not in (ClusterState.STARTING, ClusterState.RECOVERING):
            waits = ""
        else:
            waits = self.s.waiting_text(workflow.now())
        if waits != self.s.waits_for:
            self.s.waits_for = waits
            self._dirty = True

    def _touch(self, node: NodeEntry) -> None:
        self._changed[node.id] = None
        self._dirty = True
        self._wake()

    # --- helpers ------------------------------------------------------------------------------------------

    async def _command(
        self, head: NodeEntry, kind: CommandKind, args: dict[str, Any], timeout: timedelta
    ) -> dict[str, Any] | None:
        """The head's answer; None if it gave none within ``timeout`` or could not carry it out."""
        self.s.commands += 1
        command = workflow.start_activity_method(
            CommandActivities.run_command,
            CommandRequest(
                id=f"{self.input.cluster_id}-{kind}-{self.s.commands}",
                cluster_id=self.input.cluster_id,
                node_id=head.id,
                kind=kind,
                args=args,
            ),
            summary=f"{kind} on the head",
            schedule_to_close_timeout=timeout,
            **policies.COMMAND,
        )
        await workflow.wait_condition(lambda: command.done() or not head.live)
        if not command.done():
            command.cancel()  # its head is given up: nobody will ever answer
            return None
        try:
            answer: dict[str, Any] = await command
            return answer
        except ActivityError as error:
            self._event("command_failed", f"{kind}: {error.cause or error}", level=EventLevel.WARNING)
            return None

    def _node_config(self, group: str) -> NodeConfig:
        return self.config.head_node if group == HEAD else (self.config.group(group) or NodeConfig())

    def _group_config(self, group: str) -> GroupConfig:
        config = self._node_config(group)
        bounds = self.s.bounds.get(group, Bounds(min_nodes=0, max_nodes=0))
        return GroupConfig(
            name=group,
            resources=resources_of(config),
            labels=config.labels,
            min_nodes=bounds.min_nodes,
            max_nodes=bounds.max_nodes,
        )

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """At most one task of a name at a time; its end wakes the main loop."""
        if name in self._tasks:
            work.close()
            return

        async def guarded() -> None:
            try:
                await work
            except ActivityError as error:
                self._event("step_failed", f"{name}: {error.cause or error}", level=EventLevel.ERROR)
            except Exception as error:  # noqa: BLE001
                self._bug = error  # raised by the main loop: the task fails, is tried again, and an operator sees it
            finally:
                self._tasks.pop(name, None)
                self._wake()

        self._tasks[name] = asyncio.create_task(guarded())

    def _wake(self) -> None:
        self._woken = True

    def _set_alarm(self) -> None:
        """One timer for the nearest deadline. It is not moved when that deadline moves away: it then fires early,
        finds nothing to do and is set anew, which is cheaper than two events for every message."""
        now = workflow.now()
        wishes: list[tuple[datetime, str]] = []

        def wish(at: datetime | None, why: str) -> None:
            if at is not None and at > now:
                wishes.append((at, why))

        wish(self._retry_flush_at, "write the records again")
        if self.s.phase != ClusterState.TERMINATING:
            wish(self.s.phase_deadline, f"deadline of {self.s.phase}")
            wish(self.s.uptime_deadline(self.config), "maximum uptime")
            wish(self.s.idle_deadline(self.config), "idle shutdown")
            wish(self._lease_check_due(), "check the leases")
            for node in self.s.nodes.values():
                wish(self._node_deadline(node), f"deadline of {node.group} node {node.slot}.{node.generation}")
                if node.role == NodeRole.HEAD and node.live and node.machine_id:
                    wish(node.taken_at, "the head's machine should be gone")
                if node.state == NodeState.REQUESTED:
                    wish(node.not_before, f"back-off before {node.group} node {node.slot}.{node.generation}")
        if not wishes:
            return
        at, why = min(wishes)
        if self._alarm_at is not None and self._alarm_at <= at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.create_task(self._ring(at - now, why))

    async def _ring(self, after: timedelta, why: str) -> None:
        await workflow.sleep(after, summary=why)
        self._alarm_at, self._alarm = None, None
        self._wake()

    def _may_continue_as_new(self) -> bool:
        return (
            workflow.info().is_continue_as_new_suggested()
            and not self._tasks
            and not self._dirty
            and workflow.all_handlers_finished()
        )
