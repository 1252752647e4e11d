"""How a cluster gets its nodes and is healed: places and launches, deadlines of a boot, heads that fall silent."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from functools import partial

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.nodes import HandOver, LaunchNode, MachineRefs, NodeActivities
    from clouds.contract.machines import Machine, MachineState
    from clouds.contract.retained import RetainedResources
    from heliostat.models.clouds import Market
    from heliostat.models.clusters import Activity, ClusterState, NodeRole, NodeState
    from heliostat.models.common import EventLevel
    from runtime.messages.clusters import HeadSilent, NodeFact
    from workflows import ids, policies
    from workflows.clusters.ending import ClusterEnds
    from workflows.clusters.progress import HEAD
    from workflows.clusters.state import NodeEntry, Place, desired_of, moment_of, resources_of
CAPACITY = ("no_capacity", "not_offered", "quota_exceeded")
"""Launch failures that another place may not have."""


class ClusterNodes(ClusterEnds):
    # --- launching ----------------------------------------------------------------------------------------

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
                self.steps.start(f"launch {node.id}", partial(self._launch, node))

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
            keep=RetainedResources.of(self.config.head_node, had=self.s.kept_in is not None) if node.kept else None,
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
            self.steps.start(f"hand over to {node.id}", partial(self._hand_over, node))
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
            if isinstance(cause, ApplicationError) and cause.type in policies.UNRECOVERABLE and not self.s.ready:
                self._fail(node.reason)

    def _launch_failed(self, node: NodeEntry, code: str, message: str) -> None:
        if code in CAPACITY and workflow.patched("places"):
            self._no_machine(node, code, message)
            return
        self.recorder.event(
            "launch_failed", f"{node.group} node {node.slot}.{node.generation}: {message}", level=EventLevel.WARNING
        )
        self.s.failures[node.group] = self.s.failures.get(node.group, 0) + 1
        self.s.cause = code
        self.s.condition("CapacityAvailable", False, workflow.now(), code, message)
        if node.live:
            self._give_up(node, message)
        if code in policies.UNRECOVERABLE and self.s.phase in (ClusterState.STARTING, ClusterState.RECOVERING):
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
            self.recorder.event("launch_failed", text, level=EventLevel.WARNING)
        self.s.cause = code
        self.s.condition("CapacityAvailable", False, now, code, said)
        if node.live:
            self._give_up(node, f"{node.place}: {message}")
        if hopeless and self.s.phase in (ClusterState.STARTING, ClusterState.RECOVERING):
            self._fail(f"no zone of the cloud offers the instance types of {node.group}: {message}")
        self._say_waits()

    # --- healing ------------------------------------------------------------------------------------------

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
        self.recorder.event("node_running", f"{node.group} node {node.slot}.{node.generation} ({node.ip})")
        self._touch(node)

    def _check_nodes(self, now: datetime) -> None:
        for node in list(self.s.nodes.values()):
            due = self._node_deadline(node)
            if node.role == NodeRole.HEAD and node.live and node.machine_id and node.taken_at and now >= node.taken_at:
                node.taken_at = None  # if it is still there, its silence will tell
                silent = HeadSilent(event_id=f"{node.id}/taken", node_id=node.id, since=now)
                self.steps.start("ask after head", partial(self._ask_after_head, node, silent))
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
        self.recorder.event("spot_notice", text, level=EventLevel.WARNING, actor=f"agent:{fact.node_id}")
        self._touch(node)

    def _lose(self, node: NodeEntry, reason: str, *, failed: bool) -> None:
        """A node is no more, or no use. Its machine is ended all the same; the slot is filled again."""
        if not node.live:
            return
        self.recorder.event(
            "node_lost", f"{node.group} node {node.slot}.{node.generation}: {reason}", level=EventLevel.WARNING
        )
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
        self.wake()

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
        self.recorder.event("cluster_ready", f"ready after {sum(self.s.phase_seconds.values()):.1f} s")

    def _desire(self, fact: NodeFact) -> None:
        """Absolute counts from Ray's autoscaler; our bounds hold here, not there."""
        wanted, remove = desired_of(fact.data)
        wanted = {g: n for g, n in wanted.items() if g in self.s.bounds}
        remove = [n for n in remove if n in self.s.nodes]
        if wanted != self.s.desired or remove:
            text = ", ".join(f"{g} {n}" for g, n in sorted(wanted.items()))
            self.recorder.event("scale", f"autoscaler wants {text}", actor=f"agent:{fact.node_id}")
        self.s.desired = wanted
        self.s.remove += [n for n in remove if n not in self.s.remove]
