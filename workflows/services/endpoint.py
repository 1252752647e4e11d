"""The service's endpoint: its load balancer and the backends behind it."""

from __future__ import annotations

from typing import NoReturn

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from activities.endpoints import EndpointActivities, EndpointRef, EnsureEndpoint, SetBackends
    from clouds.contract.balancer import Endpoint
    from heliostat.models.common import EventLevel
    from runtime.messages.services import EndpointLost, EndpointTrouble, ServiceInput
    from workflows import policies
    from workflows.entity.alarm import Wakeup
    from workflows.entity.steps import RetryLater, Steps
    from workflows.services.checklist import ENDPOINT
    from workflows.services.patches import UNSURE
    from workflows.services.records import ServiceRecords
    from workflows.services.state import LIVING, ServiceData

BACKENDS = "backends"
REMOVE = "remove the endpoint"


class ServiceEndpoint:
    def __init__(self, arg: ServiceInput, s: ServiceData, records: ServiceRecords, steps: Steps, wake: Wakeup) -> None:
        self._arg = arg
        self._s = s
        self._records = records
        self._steps = steps
        self._wake = wake
        self.trouble = ""
        """Why the newest call to the load balancer failed; "" when it did not."""
        self.removed = False

    def observe_loss(self, message: EndpointLost) -> None:
        """The monitor found that the load balancer no longer exists, or has lost its backends."""
        if self._s.first_sight(message.event_id) and self._s.url and self._s.terminate is None:
            self._records.event("endpoint_lost", message.reason, level=EventLevel.ERROR)
            self._s.endpoint_lost = True
            self._wake()

    def observe_trouble(self, message: EndpointTrouble) -> None:
        """The monitor found an error of the load balancer that it can't repair, or found that one is over."""
        if self._s.first_sight(message.event_id) and message.trouble != self._s.endpoint_trouble:
            self._s.endpoint_trouble = message.trouble
            level = EventLevel.ERROR if message.trouble else EventLevel.INFO
            self._records.event("endpoint_trouble", message.trouble or "load balancer recovered", level=level)
            self._wake()

    def reconcile(self) -> None:
        if not self._s.url or self._s.endpoint_lost:
            if self._s.versions:  # not for a deploy whose acceptance may have been rolled back
                self._steps.start("endpoint", self._ensure)
        elif not self._s.backends_applied():
            self.start_update()

    def start_update(self) -> None:
        self._steps.start(BACKENDS, self._set_backends)

    def start_removal(self) -> None:
        self._steps.start(REMOVE, self._remove)

    async def _ensure(self) -> None:
        """Also creates one again that was lost; it is given its backends afterwards. Undo: ``_remove``."""
        request = EnsureEndpoint(
            cloud_id=self._arg.cloud_id,
            service_id=self._arg.service_id,
            service_name=self._arg.name,
            grpc=any(v.spec.grpc for v in self._s.versions.values()),
        )
        try:
            endpoint: Endpoint = await workflow.execute_activity_method(
                EndpointActivities.ensure_endpoint, request, summary="create the endpoint", **policies.ENDPOINT
            )
        except ActivityError as error:
            if isinstance(error.cause, ApplicationError) and error.cause.type == "backends_lost":
                await self._set_backends()  # it exists, and is found again once it has its backends
                return
            self._fail("the endpoint could not be created", error)
        if self._s.endpoint_lost:
            self._s.endpoint_lost, self._s.backends = False, []
        self._s.url, self.trouble = endpoint.url, ""
        self._records.event("endpoint", f"endpoint {endpoint.url}")

    async def _set_backends(self) -> None:
        wanted = self._s.wanted_backends()
        self._s.backends_revision += 1
        request = SetBackends(
            cloud_id=self._arg.cloud_id,
            service_id=self._arg.service_id,
            revision=self._s.backends_revision,
            backends=wanted,
        )
        names = {v.spec.id: v.spec.name for v in self._s.versions.values()}
        weights = {names.get(b.version_id, b.version_id): b.weight for b in wanted}
        summary = ", ".join(f"{name} {weight} %" for name, weight in weights.items()) or "no backends"
        try:
            await workflow.execute_activity_method(
                EndpointActivities.set_backends, request, summary=f"weights: {summary}"[:200], **policies.ENDPOINT
            )
        except ActivityError as error:
            cause = error.cause if isinstance(error.cause, ApplicationError) else None
            if cause is not None and cause.type == "gone":
                # Somebody has removed it with all its backends. A service that ends then has nothing left to take out.
                self._s.endpoint_lost, self._s.backends = True, []
                return
            if cause is not None and cause.type == "outdated" and cause.details:
                self._s.backends_revision = max(self._s.backends_revision, int(cause.details[0]))
                return
            if workflow.patched(UNSURE):
                self._s.backends_unsure = True
                given = {backend.version_id for backend in wanted if backend.weight}
                for version in self._s.versions.values():
                    version.had_traffic = version.had_traffic or version.spec.id in given
            self._fail("the load balancer could not be updated", error)
        before = {b.version_id: b.weight for b in self._s.backends if b.weight}
        after = {b.version_id: b.weight for b in wanted if b.weight}
        self._s.backends, self._s.backends_unsure = wanted, False
        self._s.endpoint_lost, self.trouble = False, ""
        for version in self._s.versions.values():
            share = after.get(version.spec.id, 0)
            version.had_traffic = version.had_traffic or share > 0
            if share != before.get(version.spec.id, 0):
                self._records.event("weight", f"{version.spec.name}: {share} % of the traffic")
            if version.state in LIVING or share != before.get(version.spec.id, 0):
                self._records.set_condition(version, "Weight", share > 0, "Share", f"{share} % of the traffic")
            self._records.touch(version)

    def _fail(self, what: str, error: ActivityError) -> NoReturn:
        why = getattr(error.cause, "message", None) or error.cause or error
        self._records.event("endpoint_failed", f"{what}: {why}", level=EventLevel.ERROR)
        self.trouble = f"{ENDPOINT}{what}: {why}"
        raise RetryLater

    async def _remove(self) -> None:
        """Also where none is known: a step that made one may have been cut off."""
        await workflow.execute_activity_method(
            EndpointActivities.remove_endpoint,
            EndpointRef(cloud_id=self._arg.cloud_id, service_id=self._arg.service_id),
            summary="remove the endpoint",
            **policies.REMOVE_ENDPOINT,
        )
        self._s.url, self._s.backends = "", []
        self._records.touch_service()
        self.removed = True
