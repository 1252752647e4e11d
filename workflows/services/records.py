"""How a service's workflow reports: events, states and reasons for the records, the page for Temporal's UI."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.records import RecordActivities, ServiceRecord
    from heliostat.models.common import EventLevel
    from heliostat.models.services import ServiceState, ServiceVersionState
    from runtime.messages.common import SYSTEM, TerminateRequest
    from runtime.messages.services import ServiceInput
    from workflows import policies
    from workflows.entity.alarm import Wakeup
    from workflows.entity.recorder import Recorder
    from workflows.services.state import ENDED_KEPT, ServiceData, VersionData
    from workflows.services.view import service_details, service_resource, version_resource


class ServiceRecords:
    def __init__(self, arg: ServiceInput, s: ServiceData, recorder: Recorder, wake: Wakeup) -> None:
        self._arg = arg
        self._s = s
        self._recorder = recorder
        self._wake = wake

    def event(self, kind: str, message: str, *, level: EventLevel = EventLevel.INFO, actor: str = "") -> None:
        self._recorder.event(kind, message, level=level, actor=actor)

    def enter(self, state: ServiceState, reason: str, actor: str = "") -> None:
        if state != self._s.state:
            self._s.state, self._s.state_since = state, workflow.now()
            level = EventLevel.WARNING if state == ServiceState.UNHEALTHY else EventLevel.INFO
            self.event("state", f"{state}: {reason}", level=level, actor=actor)
        if reason != self._s.reason:
            self._s.reason = reason
            self._recorder.dirty = True

    def enter_version(self, version: VersionData, state: ServiceVersionState, reason: str) -> None:
        if state != version.state:
            version.state, version.state_since = state, workflow.now()
            level = EventLevel.WARNING if state == ServiceVersionState.UNHEALTHY else EventLevel.INFO
            self.event("version_state", f"{version.spec.name} {state}: {reason}", level=level)
        version.reason = reason
        self.touch(version)

    def set_condition(self, version: VersionData, kind: str, status: bool, reason: str, message: str) -> None:
        """One line of the version's checklist."""
        if version.condition(kind, status, workflow.now(), reason, message):
            self.touch(version)

    def set_waiting_on(self, text: str) -> None:
        if text != self._s.waits_for:
            self._s.waits_for = text
            self._recorder.dirty = True
            self._wake()

    def touch(self, version: VersionData) -> None:
        """The version goes along with the next write; the main loop looks at it again."""
        self._recorder.touch(version.spec.id)
        self._wake()

    def touch_service(self) -> None:
        """The service itself has changed: write it."""
        self._recorder.dirty = True

    async def flush(self) -> None:
        """Writes the projection and shows the same in Temporal's UI."""
        self._forget_ended()
        self._s.revision += 1
        batch = self._recorder.take(self._s.revision)
        versions = [self._s.versions[v] for v in batch.changed if v in self._s.versions]
        record = ServiceRecord(
            service=service_resource(self._arg, self._s),
            versions=[version_resource(self._arg, self._s, version) for version in versions],
            events=batch.events,
        )
        self._recorder.show(self._s.state, service_details(self._arg, self._s))
        recorded = await self._recorder.write(
            batch,
            workflow.execute_local_activity_method(
                RecordActivities.record_service, record, summary=f"record {self._s.state}", **policies.RECORD
            ),
        )
        if recorded is not None and not recorded.wanted and self._s.terminate is None:
            # The row is lost for good (the records were restored from an older backup): nobody can reach this service.
            self._s.terminate = TerminateRequest(actor=SYSTEM, reason="the records do not know this service")
            self._wake()

    def _forget_ended(self) -> None:
        """Keeps the newest ended versions and the one to roll back to. An ended version is written once more before it
        goes."""
        ended = [
            v for v in self._s.versions.values()
            if v.state == ServiceVersionState.TERMINATED
            and v.spec.id not in (*self._recorder.changed, self._s.previous)
        ]  # fmt: skip
        r = self._s.rollout
        busy = {*r.version_ids, *r.base} if r is not None else set()
        ended.sort(key=lambda v: v.spec.number)
        for version in ended[:-ENDED_KEPT]:
            if version.spec.id not in busy:
                del self._s.versions[version.spec.id]
