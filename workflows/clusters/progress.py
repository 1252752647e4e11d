"""What every part of ClusterWorkflow stands on: its state, its tasks, and how it is told to the records and to those
who hold a lease.

``ClusterWorkflow`` is one class in four files, each on top of the one before: this one, ``cluster_ends`` (why and how
machines and the cluster end), ``cluster_nodes`` (launching and healing), ``clusters`` (messages and the life).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, FailureError

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandActivities, CommandRequest
    from activities.records import ClusterRecord, RecordActivities
    from heliostat.models.agents import CommandKind, GroupConfig
    from heliostat.models.clusters import ClusterState, NodeState
    from heliostat.models.common import Event, EventLevel
    from heliostat.models.compute_configs import NodeConfig, resources_of
    from runtime.messages.clusters import ClusterInput, ClusterNotice, LeaseAnswer
    from runtime.messages.common import TerminateRequest
    from workflows import ids, policies
    from workflows.clusters.state import Bounds, ClusterData, NodeEntry
    from workflows.clusters.view import cluster_details, cluster_resource, node_resource

STATE = SearchAttributeKey.for_keyword("HeliostatState")

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
