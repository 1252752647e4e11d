"""Launches: each node that is requested gets its machine, at the next placement that may have one."""

from __future__ import annotations

import asyncio
from datetime import datetime
from functools import partial

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.nodes import LaunchNode, NodeActivities
    from clouds.contract.machines import Machine, MachineState
    from clouds.contract.retained import RetainedResources
    from heliostat.models.clusters import ClusterState, NodeRole, NodeState
    from heliostat.models.common import EventLevel
    from runtime.messages.clusters import ClusterInput
    from workflows import ids, policies
    from workflows.clusters import placement
    from workflows.clusters.nodes import Nodes
    from workflows.clusters.placement import Placement
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.retained import RetainedAttachment
    from workflows.clusters.state import ClusterData, NodeEntry, node_config, resources_of
    from workflows.entity.alarm import Deadline, earliest
    from workflows.entity.recorder import Recorder
    from workflows.entity.steps import Steps

CAPACITY = ("no_capacity", "not_offered", "quota_exceeded")
"""Launch failures that another placement may not have."""


class Launching:
    def __init__(
        self,
        request: ClusterInput,
        state: ClusterData,
        recorder: Recorder,
        progress: ClusterProgress,
        steps: Steps,
        nodes: Nodes,
        retained: RetainedAttachment,
    ) -> None:
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress
        self._steps = steps
        self._nodes = nodes
        self._retained = retained

    def request(self, role: NodeRole, group: str, now: datetime) -> None:
        """A new node, which is launched once the records have it, and after its back-off."""
        slot = self._s.take_slot(group)
        generation = self._s.generations[str(slot)]
        failures = self._s.failures.get(group, 0)
        places = self._placements(group)
        place, at = placement.choose(self._s.shortages, places, now)
        # Every placement is tried once before the back-off begins; a group whose nodes die young waits in any case.
        wait = policies.backoff(max(failures // len(places), self._s.deaths.get(group, 0)))
        if wait:
            at = max(now + wait, at or now)
        node = NodeEntry(
            id=ids.node_id(self._input.cluster_id, slot, generation),
            role=role,
            group=group,
            slot=slot,
            generation=generation,
            token=ids.launch_token(self._input.cluster_id, slot, generation),
            zone=place.zone,
            market=place.market,
            instance_type=place.instance_type,
            kept=place.kept,
            created_at=now,
            not_before=at,
        )
        self._s.nodes[node.id] = node
        self._progress.touch(node)

    def _placements(self, group: str) -> list[Placement]:
        """Failures that are not for a lack of machines go through them too: one zone's network may be at fault."""
        config = self._input.config
        places = placement.placements(config, node_config(config, group), self._s.kept_in)
        first = self._s.failures.get(group, 0) % len(places)
        return places[first:] + places[:first]

    def reconcile(self, now: datetime) -> Deadline | None:
        requested = [n for n in self._s.nodes.values() if n.state == NodeState.REQUESTED]
        for node in requested:
            due = node.not_before is None or node.not_before <= now
            if node.boot is not None and due and not node.launching:
                node.launching = node.asked = True
                node.asked_at = now
                self._s.keeps = self._s.keeps or node.kept
                self._steps.start(f"launch {node.id}", partial(self._launch, node))
        return earliest(now, ((n.not_before, f"back-off before {n.label}") for n in requested))

    async def _launch(self, node: NodeEntry) -> None:
        """Undo: ``Ending._end``, by token where the answer was lost."""
        launch = workflow.start_activity_method(
            NodeActivities.launch_node,
            self._launch_request(node),
            summary=f"launch {node.group} node, slot {node.slot}, generation {node.generation}",
            # A launch that waits for its next try is cancelled at once; one that is being tried is waited for, since
            # its machine must be ended too.
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
            self._failed(node, code or "unknown", message)
            return
        node.launching = False
        node.machine_id = machine.machine_id
        node.ip = node.ip or machine.ip
        node.launched_at = workflow.now()
        self._s.shortages.pop(node.place.key, None)
        if machine.state == MachineState.GONE and node.live:
            self._nodes.lose(node, machine.reason or "its machine has ended", failed=True)
        elif node.state == NodeState.REQUESTED:
            node.state = NodeState.LAUNCHED
        self._nodes.used_retained(node)
        if node.kept and node.live:
            self._steps.start(f"attach the retained resources to {node.id}", partial(self._retained.attach, node))
        self._progress.touch(node)

    def _launch_request(self, node: NodeEntry) -> LaunchNode:
        config = node_config(self._input.config, node.group)
        resources = resources_of(config)
        required = config.required_resources
        assert node.boot is not None
        retained = RetainedResources.of(self._input.config.head_node, had=self._s.kept_in is not None)
        return LaunchNode(
            cloud_id=self._input.cloud_id,
            cluster_id=self._input.cluster_id,
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
            tags=self._input.tags,
            accelerator=required.accelerator if required else None,
            cpu_architecture=required.cpu_architecture if required else None,
            advanced=config.advanced_instance_config,
            keep=retained if node.kept else None,
        )

    def _failed(self, node: NodeEntry, code: str, message: str) -> None:
        if code in CAPACITY and workflow.patched("places"):
            self._no_capacity(node, code, message)
            return
        self._recorder.event("launch_failed", f"{node.label}: {message}", level=EventLevel.WARNING)
        self._s.failures[node.group] = self._s.failures.get(node.group, 0) + 1
        self._s.cause = code
        self._s.condition("CapacityAvailable", False, workflow.now(), code, message)
        if node.live:
            self._progress.give_up(node, message)
        if code in policies.UNRECOVERABLE and self._starting():
            self._progress.fail(message)
        self._progress.set_waiting_on()

    def _no_capacity(self, node: NodeEntry, code: str, message: str) -> None:
        """The next launch goes to the next placement; it waits only when all are short."""
        now, places = workflow.now(), self._placements(node.group)
        # A quota is of a type and market, in all zones.
        alike = [p for p in places if (p.market, p.instance_type) == (node.market, node.instance_type)]
        here = alike if code == "quota_exceeded" else [node.place]
        shortages = self._s.shortages
        new = placement.add_shortage(shortages, here, node.asked_at or now, now, final=code == "not_offered")
        place, at = placement.choose(shortages, places, now)
        unobtainable = placement.unobtainable(shortages, places)
        then = "no other placement" if unobtainable else f"trying {place}" + (f" at {at:%H:%M:%S} UTC" if at else "")
        text = f"{node.place}: {message} ({code}); {then}"
        if new:  # of many launches at once, the first one
            self._recorder.event("launch_failed", f"{node.label}: {text}", level=EventLevel.WARNING)
        self._s.cause = code
        self._s.condition("CapacityAvailable", False, now, code, text)
        if node.live:
            self._progress.give_up(node, f"{node.place}: {message}")
        if unobtainable and self._starting():
            self._progress.fail(f"no zone of the cloud offers the instance types of {node.group}: {message}")
        self._progress.set_waiting_on()

    def _starting(self) -> bool:
        return self._s.phase in (ClusterState.STARTING, ClusterState.RECOVERING)
