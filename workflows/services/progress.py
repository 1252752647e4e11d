"""What every part of ServiceWorkflow stands on: its state, its tasks, its one timer, and how it is told to the records.

``ServiceWorkflow`` is one class in five files, each on top of the one before: this one, ``service_clusters`` (clusters,
Serve and the endpoint), ``service_notices`` (heads that are to be taken back), ``service_rollouts`` (the passage from
one version to the next), ``services`` (messages and the life).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import FailureError

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandActivities, CommandRequest
    from activities.records import RecordActivities, ServiceRecord
    from heliostat.models.agents import CommandKind
    from heliostat.models.common import Event, EventLevel
    from heliostat.models.services import ServiceState, ServiceVersionState
    from runtime.messages.common import TerminateRequest
    from runtime.messages.services import ServiceInput
    from workflows import ids, policies
    from workflows.services.state import ENDED_KEPT, ServiceData, Slot, VersionData
    from workflows.services.view import service_details, service_resource, version_resource

STATE = SearchAttributeKey.for_keyword("HeliostatState")


class ServiceBase:
    def __init__(self, request: ServiceInput) -> None:
        self.input = request
        if request.state is not None:
            self.s = ServiceData.model_validate(request.state)
        else:
            self.s = ServiceData.begun(workflow.now(), request.revision)
        self._dirty = False  # nothing is written before the first deploy is known to be wanted
        self._changed: dict[str, None] = {}
        """Versions to be written."""
        self._events: list[Event] = []
        self._woken = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._again: dict[str, tuple[int, datetime]] = {}
        """Of a step that failed: how often in a row, and when it may be tried again."""
        self._alarm_at: datetime | None = None
        self._alarm: asyncio.Task[None] | None = None
        self._retry_flush_at: datetime | None = None
        self._unwritten = 0
        self._withdrawn = False
        self._shown_state = "" if request.state is not None else ServiceState.STARTING.value
        self._bug: Exception | None = None
        self._endpoint_trouble = ""
        """What is wrong with the load balancer, "" when nothing is."""

    # --- commands to heads --------------------------------------------------------------------------------

    async def _command(
        self,
        slot: Slot,
        kind: CommandKind,
        args: dict[str, Any],
        timeout: timedelta,
        *,
        until: Callable[[], bool] = lambda: False,
        id: str = "",
    ) -> dict[str, Any]:
        """The head's answer. The command's number goes along (``order``): one that is no longer waited for may still be
        on its way, and the head must not take it for newer than the one after it.

        Raises:
            ActivityError: it could not carry it out, or gave no answer within ``timeout``.
            CommandOff: its head is gone, or ``until`` came true first.
        """
        assert slot.head_node_id is not None
        head, cluster = slot.head_node_id, slot.cluster_id
        id = id or self._command_id(kind)
        args = args | {"order": int(id.rpartition("-")[2])}
        command = workflow.start_activity_method(
            CommandActivities.run_command,
            CommandRequest(id=id, cluster_id=cluster, node_id=head, kind=kind, args=args),
            summary=f"{kind} on cluster {slot.number} ({cluster})",
            schedule_to_close_timeout=timeout,
            **policies.COMMAND,
        )

        def off() -> bool:
            return until() or slot.head_node_id != head or slot.cluster_id != cluster

        await workflow.wait_condition(lambda: command.done() or off())
        if not command.done():
            let_go(command)
            raise CommandOff
        answer: dict[str, Any] = await command
        return answer

    def _command_id(self, kind: CommandKind) -> str:
        self.s.commands += 1
        # The revision with which it was started: a service that is started again counts from 1 again.
        return f"{self.input.service_id}-{self.input.revision}-{kind}-{self.s.commands}"

    # --- telling ------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Writes the projection; shows the same in the Temporal UI."""
        self._dirty = False
        self._forget_ended()
        self.s.revision += 1
        changed, self._changed = list(self._changed), {}
        events, self._events = self._events, []
        for index, event in enumerate(events):
            event.id = ids.event_id(self.input.service_id, self.s.revision, index)
        service = service_resource(self.input, self.s)
        workflow.set_current_details(service_details(self.input, self.s))
        if self._shown_state != self.s.state:
            self._shown_state = self.s.state
            workflow.upsert_search_attributes([STATE.value_set(str(self.s.state))])
        record = ServiceRecord(
            service=service,
            versions=[
                version_resource(self.input, self.s, self.s.versions[v]) for v in changed if v in self.s.versions
            ],
            events=events,
        )
        try:
            recorded = await workflow.execute_local_activity_method(
                RecordActivities.record_service, record, summary=f"record {self.s.state}", **policies.RECORD
            )
        except FailureError:  # see policies.RECORD
            # Nothing may be lost: the next flush carries it all again, under a greater revision.
            self._dirty = True
            self._changed = {**dict.fromkeys(changed), **self._changed}
            self._events = events + self._events
            self._unwritten += 1
            wait = policies.rewrite_after(self._unwritten)
            workflow.logger.error("records out of reach, writing again in %d s", wait.total_seconds())
            self._retry_flush_at = workflow.now() + wait
            return
        self._retry_flush_at, self._unwritten = None, 0
        if not recorded.wanted and self.s.terminate is None:
            # The row is gone for good (records restored from before it): nobody can reach this service any more.
            self.s.terminate = TerminateRequest(actor="records", reason="the records do not know this service")
            self._wake()

    def _forget_ended(self) -> None:
        """Of the ended versions the newest few, and the one to roll back to, stay; told once more before they go."""
        ended = [
            v for v in self.s.versions.values()
            if v.state == ServiceVersionState.TERMINATED and v.spec.id not in (*self._changed, self.s.previous)
        ]  # fmt: skip
        busy = set(self.s.rollout.version_ids) | set(self.s.rollout.base) if self.s.rollout else set()
        ended.sort(key=lambda v: v.spec.number)
        for version in ended[:-ENDED_KEPT]:
            if version.spec.id not in busy:
                del self.s.versions[version.spec.id]

    def _flush_is_held(self) -> bool:
        return self._retry_flush_at is not None and workflow.now() < self._retry_flush_at

    def _enter(self, state: ServiceState, reason: str, actor: str = "") -> None:
        if state != self.s.state:
            self.s.state, self.s.state_since = state, workflow.now()
            level = EventLevel.WARNING if state == ServiceState.UNHEALTHY else EventLevel.INFO
            self._event("state", f"{state}: {reason}", level=level, actor=actor)
        if reason != self.s.reason:
            self.s.reason = reason
            self._dirty = True

    def _enter_version(self, version: VersionData, state: ServiceVersionState, reason: str) -> None:
        if state != version.state:
            version.state, version.state_since = state, workflow.now()
            bad = state == ServiceVersionState.UNHEALTHY
            self._event(
                "version_state",
                f"{version.spec.name} {state}: {reason}",
                level=EventLevel.WARNING if bad else EventLevel.INFO,
            )
        version.reason = reason
        self._touch(version)

    def _say(self, waits_for: str) -> None:
        if waits_for != self.s.waits_for:
            self.s.waits_for = waits_for
            self._dirty = True
            self._wake()

    def _check(self, version: VersionData, kind: str, status: bool, reason: str, message: str = "") -> None:
        """Sets a line of the version's checklist."""
        if version.condition(kind, status, workflow.now(), reason, message):
            self._touch(version)

    def _event(self, kind: str, message: str, *, level: EventLevel = EventLevel.INFO, actor: str = "") -> None:
        self._dirty = True
        self._events.append(
            Event(
                id="",
                resource_id=self.input.service_id,
                at=workflow.now(),
                level=level,
                kind=kind,
                actor=actor or self.input.service_id,
                message=message,
            )
        )

    def _touch(self, version: VersionData) -> None:
        self._changed[version.spec.id] = None
        self._dirty = True
        self._wake()

    # --- tasks and time -----------------------------------------------------------------------------------

    def _start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """At most one task of a name at a time; its end wakes the main loop. One that failed comes again later: not by
        sleeping in the task, for a history is cut only while none is under way."""
        failures, not_before = self._again.get(name, (0, workflow.now()))
        if name in self._tasks or workflow.now() < not_before:
            return

        async def guarded() -> None:
            try:
                await work()
                self._again.pop(name, None)
            except CommandOff:
                pass  # what it was for is gone; the main loop sees what there is now
            except (TryAgain, FailureError) as error:
                if isinstance(error, FailureError):  # also of a local activity: see policies.RECORD
                    self._event("step_failed", f"{name}: {error.cause or error}", level=EventLevel.ERROR)
                wait = min(policies.STEP_AGAIN * 2**failures, policies.STEP_AGAIN_MAX)
                self._again[name] = (failures + 1, workflow.now() + wait)
            except Exception as error:  # noqa: BLE001
                self._bug = error  # raised by the main loop: the task fails, is tried again, and an operator sees it
            finally:
                self._tasks.pop(name, None)
                self._wake()

        self._tasks[name] = asyncio.create_task(guarded())

    def _wake(self) -> None:
        self._woken = True

    def _wishes(self) -> list[tuple[datetime, str]]:
        """Moments at which the main loop must look again, with the reason; more in the classes above."""
        found = [(at, f"{name} failed: look again") for name, (_, at) in self._again.items()]
        if self._retry_flush_at is not None:
            found.append((self._retry_flush_at, "write the records again"))
        return found

    def _set_alarm(self) -> None:
        """One timer for the nearest of them; see ``ClusterWorkflow._set_alarm``."""
        now = workflow.now()
        wishes = [w for w in self._wishes() if w[0] > now]
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


def let_go(handle: workflow.ActivityHandle[Any]) -> None:
    """Cancels what is not done; nobody reads how it ends, and asyncio is told so."""
    if not handle.done():
        handle.add_done_callback(lambda h: h.cancelled() or h.exception())
        handle.cancel()


class TryAgain(Exception):
    """A step came to nothing, which is told already; to be tried again after a while."""


class CommandOff(Exception):
    """A command is no longer waited for: its head is gone, or what it was for."""
