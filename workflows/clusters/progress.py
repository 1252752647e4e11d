"""What every part of ClusterWorkflow stands on: its state, its tasks, and how it is told to the records and to those
who hold a lease.

``ClusterWorkflow`` is one class in four files, each on top of the one before: this one, ``cluster_ends`` (why and how
machines and the cluster end), ``cluster_nodes`` (launching and healing), ``clusters`` (messages and the life).
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandRequest
    from activities.records import ClusterRecord, RecordActivities
    from heliostat.models.agents import CommandKind, GroupConfig
    from heliostat.models.clusters import ClusterState, NodeState
    from heliostat.models.common import EventLevel
    from heliostat.models.compute_configs import NodeConfig
    from runtime.messages.clusters import ClusterInput, ClusterNotice, LeaseAnswer
    from runtime.messages.common import TerminateRequest
    from workflows import policies
    from workflows.clusters.state import Bounds, ClusterData, NodeEntry, resources_of
    from workflows.clusters.view import cluster_details, cluster_resource, node_resource
    from workflows.entity.alarm import Alarm, Wakeup
    from workflows.entity.commands import CommandAbandoned, run_command
    from workflows.entity.recorder import Recorder
    from workflows.entity.steps import Steps

HEAD = "head"


class ClusterBase:
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
        first = request.state is None
        self._withdrawn = False
        self.recorder = Recorder(request.cluster_id, shown=ClusterState.STARTING.value if first else "", dirty=first)
        self.wake = Wakeup()
        self.alarm = Alarm(self.wake)
        self.steps = Steps(self.recorder, self.wake)
        # Nobody is told what it knows: a job that makes a cluster knows that it starts, and one run of the workflow
        # ends only when all was told.
        self._fencing = False
        self._told = self._news()

    # --- telling ------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Writes the projection and tells the lease holders what changed for them."""
        self.s.revision += 1
        batch = self.recorder.take(self.s.revision)
        changed = [self.s.nodes[i] for i in batch.changed if i in self.s.nodes]
        ended = [n.id for n in changed if n.state == NodeState.TERMINATED]
        record = ClusterRecord(
            cluster=cluster_resource(self.input, self.s),
            nodes=[node_resource(self.input.cluster_id, n) for n in changed],
            node_configs={
                n.id: {**self._group_config(n.group).model_dump(mode="json")} for n in changed if n.boot is None
            },
            cloud_id=self.input.cloud_id,
            events=batch.events,
        )
        self.recorder.show(self.s.phase, cluster_details(self.input, self.s))
        notice = asyncio.create_task(self._tell_holders())
        try:
            recorded = await self.recorder.write(
                batch,
                workflow.execute_local_activity_method(
                    RecordActivities.record_cluster, record, summary=f"record {self.s.phase}", **policies.RECORD
                ),
            )
        finally:
            await notice
        if recorded is None:
            return
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
                    self.recorder.dirty = True
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
        self.recorder.event("state", f"{phase}: {reason}", level=level, actor=actor)

    def _say_waits(self) -> None:
        if self.s.phase not in (ClusterState.STARTING, ClusterState.RECOVERING):
            waits = ""
        else:
            waits = self.s.waiting_text(workflow.now())
        if waits != self.s.waits_for:
            self.s.waits_for = waits
            self.recorder.dirty = True

    def _touch(self, node: NodeEntry) -> None:
        self.recorder.touch(node.id)
        self.wake()

    # --- helpers ------------------------------------------------------------------------------------------

    async def _command(
        self, head: NodeEntry, kind: CommandKind, args: dict[str, Any], timeout: timedelta
    ) -> dict[str, Any] | None:
        """The head's answer; None if it gave none within ``timeout`` or could not carry it out."""
        self.s.commands += 1
        request = CommandRequest(
            id=f"{self.input.cluster_id}-{kind}-{self.s.commands}",
            cluster_id=self.input.cluster_id,
            node_id=head.id,
            kind=kind,
            args=args,
        )
        try:
            return await run_command(
                request, summary=f"{kind} on the head", timeout=timeout, abandon=lambda: not head.live
            )
        except CommandAbandoned:
            return None
        except ActivityError as error:
            self.recorder.event("command_failed", f"{kind}: {error.cause or error}", level=EventLevel.WARNING)
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
