"""Health of a service without a rollout: does any cluster with traffic answer?"""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.services import ServiceState
    from workflows.services.records import ServiceRecords
    from workflows.services.state import ServiceData


class Health:
    """Danger: its reasons are compared with the one in the state, which may come from an older release. Reworded, they
    would count as a change, and a replay would write the records once more than the history did."""

    def __init__(self, s: ServiceData, records: ServiceRecords) -> None:
        self._s = s
        self._records = records

    def reconcile(self) -> None:
        if self._s.rollout is not None or self._s.primary is None or not self._s.weights:
            return
        serving = [self._s.versions[v] for v in self._s.weights if v in self._s.versions]
        slots = [(v, slot) for v in serving for slot in v.slots]
        fit = [slot for v, slot in slots if slot.serves(v.spec.id)]
        names = ", ".join(v.spec.name for v in serving)
        if self._s.endpoint_trouble:
            self._records.enter(ServiceState.UNHEALTHY, f"its load balancer: {self._s.endpoint_trouble}")
            return
        if not fit:
            why = next((s.message or s.reason for _, s in slots if s.message or s.reason), "")
            self._records.enter(ServiceState.UNHEALTHY, f"no cluster of {names} serves: {why}".rstrip(": "))
            return
        partial = "" if len(fit) == len(slots) else f" on {len(fit)} of {len(slots)} clusters"
        if self._s.state == ServiceState.UNHEALTHY or partial != self._s.partial:
            self._s.partial = partial
            self._records.enter(ServiceState.RUNNING, f"{names} serves{partial}")
