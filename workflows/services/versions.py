"""The versions of a service: each one's clusters, and Serve on them, are brought to what the version asks for.

``reconcile`` compares each cluster with what it should be and starts the step that is missing, one per cluster at a
time, also while no rollout runs: a replaced head gets its applications again. The slot's state guards each step, so
that a lost answer, a replaced head or continue-as-new repeats nothing: a cluster's id is fixed before it is started, a
deploy's command id before it is sent.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.services import ServiceVersionState
    from workflows import policies
    from workflows.entity.alarm import Deadline
    from workflows.entity.steps import Steps
    from workflows.services.clusters import ServiceClusters
    from workflows.services.progress import checklist
    from workflows.services.records import ServiceRecords
    from workflows.services.serve import ServeOnHeads
    from workflows.services.state import LIVING, ServiceData, Slot, VersionData

UNHEALTHY = ServiceVersionState.UNHEALTHY


class Versions:
    def __init__(
        self, s: ServiceData, records: ServiceRecords, steps: Steps, clusters: ServiceClusters, serve: ServeOnHeads
    ) -> None:
        self._s = s
        self._records = records
        self._steps = steps
        self._clusters = clusters
        self._serve = serve

    def reconcile(self, now: datetime) -> list[Deadline]:
        deadlines: list[Deadline] = []
        for version in self._s.versions.values():
            for slot in version.deployed:
                if version.state in LIVING:
                    self._reconcile_slot(version, slot, now)
                    deadlines += self._deadlines(version, slot)
                elif version.state == UNHEALTHY and slot.ready and slot.taken and slot.gate != self._s.gate_key:
                    # It is retained for inspection, so people can reach it: a deleted token must not open it any more.
                    self._start_set_gate(version, slot)
            if version.state in LIVING:
                for line in checklist(version):
                    self._records.set_condition(version, *line)
        return deadlines

    def _reconcile_slot(self, version: VersionData, slot: Slot, now: datetime) -> None:
        step = version.step_of(slot)
        if slot.open and slot.gate not in (self._s.gate_key, "draining"):  # whatever other step it is in
            self._start_set_gate(version, slot)
        if slot.failed and version.state == ServiceVersionState.RUNNING:
            # It was healthy once: what fails it now (a package, a node) may pass.
            if slot.not_before is None:
                slot.not_before = now + policies.FAILED_AGAIN
            elif slot.not_before <= now:
                slot.not_before, slot.given, slot.failed = None, "", False
        wanted = slot.wanted(version.spec.id, version.capacity)
        if not slot.made:
            if slot.not_before is None or slot.not_before <= now:
                self._steps.start(step, partial(self._clusters.start, version, slot))
        elif not slot.ready:
            if slot.asked_at is not None and now - slot.asked_at >= policies.LEASE_RECHECK:
                self._steps.start(step, partial(self._clusters.check, slot))
        elif slot.given != wanted or not slot.taken:
            if not slot.failed or slot.given != wanted:
                self._steps.start(step, partial(self._serve.deploy, version, slot))
        elif slot.gate != self._s.gate_key:
            self._start_set_gate(version, slot)
        elif slot.healthy and slot.probed != slot.given and any(b.id == slot.cluster_id for b in self._s.backends):
            if slot.probed_here(version.spec.id) or not (version.spec.probes or version.spec.grpc):
                self._serve.mark_fit(version, slot)  # another capacity of what was probed, or nothing can be probed
            else:
                self._steps.start(step, partial(self._serve.probe, version, slot))

    def _start_set_gate(self, version: VersionData, slot: Slot) -> None:
        self._steps.start(f"tokens of {version.step_of(slot)}", partial(self._serve.set_gate, version, slot))

    def _deadlines(self, version: VersionData, slot: Slot) -> list[Deadline]:
        found: list[Deadline] = []
        if not slot.made and slot.not_before is not None:
            found.append((slot.not_before, f"back-off before cluster {slot.number} of {version.spec.name}"))
        if slot.failed and slot.not_before is not None:
            found.append((slot.not_before, f"deploy to cluster {slot.number} of {version.spec.name} again"))
        if slot.made and not slot.ready and slot.asked_at is not None:
            found.append((slot.asked_at + policies.LEASE_RECHECK, "check a silent cluster"))
        return found
