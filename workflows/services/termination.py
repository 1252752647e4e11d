"""The end of a service: its versions are retired, then its endpoint is removed."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.services import ServiceState, ServiceVersionState
    from workflows import policies
    from workflows.entity.steps import Steps
    from workflows.services.deploys import Deploys
    from workflows.services.draining import Draining
    from workflows.services.endpoint import BACKENDS, REMOVE, ServiceEndpoint
    from workflows.services.patches import REVIVED
    from workflows.services.records import ServiceRecords
    from workflows.services.state import ServiceData

RETIRED = (ServiceVersionState.TERMINATING, ServiceVersionState.TERMINATED)


class Termination:
    def __init__(
        self,
        s: ServiceData,
        records: ServiceRecords,
        steps: Steps,
        draining: Draining,
        endpoint: ServiceEndpoint,
        deploys: Deploys,
    ) -> None:
        self._s = s
        self._records = records
        self._steps = steps
        self._draining = draining
        self._endpoint = endpoint
        self._deploys = deploys

    def reconcile(self) -> None:
        terminate = self._s.terminate
        assert terminate is not None
        reason = terminate.reason or "termination requested"
        if self._s.state != ServiceState.TERMINATING:
            self._begin(reason, terminate.actor)
        for version in self._s.versions.values():
            # A rollout that waited for the version's release has revived it since.
            if version.state not in RETIRED and workflow.patched(REVIVED):
                self._draining.retire(version, f"the service terminates: {reason}")
        if self._s.backends and self._s.url:
            self._endpoint.start_update()
        self._deploys.refuse_late()
        if self._endpoint.trouble:
            self._records.set_waiting_on(self._endpoint.trouble)
        ignored = {REMOVE}
        if self._draining.terminating_for(policies.TERMINATE_UNTOLD):
            ignored.add(BACKENDS)
        if self._steps.running - ignored:
            return
        if any(v.state != ServiceVersionState.TERMINATED for v in self._s.versions.values()):
            return
        if self._s.url or not self._endpoint.removed:
            self._endpoint.start_removal()
        else:
            self._s.waits_for = ""
            self._records.enter(ServiceState.TERMINATED, terminate.reason or "terminated", terminate.actor)

    def _begin(self, reason: str, actor: str) -> None:
        self._records.enter(ServiceState.TERMINATING, reason, actor)
        self._records.set_waiting_on("running steps to finish, then its clusters to be released")
        self._s.rollout, self._s.weights = None, {}
        for version in self._s.versions.values():
            version.kept_until = None
            self._draining.retire(version, f"the service terminates: {reason}")
