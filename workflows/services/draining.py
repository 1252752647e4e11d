"""The end of a version: it leaves the load balancer, its requests are drained, its clusters are released."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from functools import partial

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from heliostat.models.agents import CommandKind
    from heliostat.models.common import EventLevel
    from heliostat.models.services import ServiceState, ServiceVersionState
    from runtime.messages.clusters import Release
    from runtime.messages.services import ServiceInput
    from workflows import policies
    from workflows.entity.alarm import Deadline
    from workflows.entity.commands import CommandAbandoned
    from workflows.entity.leases import release_cluster
    from workflows.entity.steps import Steps
    from workflows.services.commands import HeadCommands
    from workflows.services.records import ServiceRecords
    from workflows.services.state import ServiceData, Slot, VersionData


class Draining:
    def __init__(
        self, arg: ServiceInput, s: ServiceData, records: ServiceRecords, steps: Steps, commands: HeadCommands
    ) -> None:
        self._arg = arg
        self._s = s
        self._records = records
        self._steps = steps
        self._commands = commands

    def retire(self, version: VersionData, reason: str) -> None:
        """The version gets no more traffic; ``reconcile`` drains it, then releases its clusters."""
        if version.state in (ServiceVersionState.TERMINATING, ServiceVersionState.TERMINATED):
            return
        version.recalled = False
        self._records.enter_version(version, ServiceVersionState.TERMINATING, reason)

    def retire_inspected(self, now: datetime) -> list[Deadline]:
        """A failed version is retained for inspection for a while."""
        deadlines: list[Deadline] = []
        for version in self._s.versions.values():
            if version.kept_until is not None and now >= version.kept_until:
                version.kept_until = None
                self.retire(version, version.reason)
            elif version.kept_until is not None:
                deadlines.append((version.kept_until, f"{version.spec.name} is retained for inspection until then"))
        return deadlines

    def reconcile(self) -> list[Deadline]:
        for version in self._s.versions.values():
            if version.state != ServiceVersionState.TERMINATING:
                continue
            # Its backends must be out of the load balancer first: while traffic comes, a drain never ends. A load
            # balancer that can't be updated does not hold up the end of the whole service.
            out = not any(b.version_id == version.spec.id for b in self._s.backends)
            if out or self.terminating_for(policies.TERMINATE_UNTOLD):
                self._steps.start(f"end {version.spec.name}", partial(self._drain_and_release, version))
        if self._s.state != ServiceState.TERMINATING:
            return []
        since = self._s.state_since
        return [
            (since + policies.TERMINATE_DRAIN, "drain deadline of the termination"),
            (since + policies.TERMINATE_UNTOLD, "release the clusters without the load balancer's answer"),
        ]

    def terminating_for(self, duration: timedelta) -> bool:
        """The whole service terminates, and has for so long."""
        return self._s.state == ServiceState.TERMINATING and workflow.now() - self._s.state_since >= duration

    async def _drain_and_release(self, version: VersionData) -> None:
        """Undoes all that the version has. While it drains, it may be recalled."""
        if version.had_traffic:
            await asyncio.gather(*(self.drain(version, slot) for slot in version.slots))
        if version.recalled:
            return
        version.releasing = True
        if version.leaving:
            await workflow.wait_condition(lambda: not version.leaving)
        for slot in version.deployed:
            await self.release(version, slot, version.reason)
        version.slots, version.relief = [], []
        version.capacity, version.releasing, version.had_traffic = None, False, False
        version.ended_at = workflow.now()
        self._records.enter_version(version, ServiceVersionState.TERMINATED, version.reason)

    async def drain(self, version: VersionData, slot: Slot) -> None:
        """Of a version that ends, which may be recalled, or of one cluster that was replaced, which is not."""
        replaced = slot in version.leaving

        def recalled() -> bool:
            return version.recalled and not replaced

        if not slot.ready or not slot.http or recalled():
            return
        name, limit = version.spec.name, version.spec.rollout.drain_timeout_s
        if self._s.terminate is not None:
            limit = min(limit, policies.TERMINATE_DRAIN.total_seconds())
        slot.gate = "draining"
        try:
            seen = await self._commands.run(
                slot,
                CommandKind.SERVE_DRAIN,
                {"timeout_s": limit},
                timedelta(seconds=limit) + policies.DRAIN_ANSWER,
                abandon=lambda: recalled() or self.terminating_for(policies.TERMINATE_DRAIN),
            )
        except CommandAbandoned:
            # Its head is lost with all its requests; or the version is recalled; or the service terminates by now.
            if self.terminating_for(policies.TERMINATE_DRAIN) and not recalled():
                self._records.event("drain_deadline", f"{name}: the service terminates", level=EventLevel.WARNING)
            return
        except ActivityError as error:
            self._records.event("drain_unconfirmed", f"{name}: {error.cause or error}", level=EventLevel.WARNING)
            return
        if seen.get("drained"):
            self._records.event("drained", f"{name}: no request is open after {seen.get('seconds', 0):.1f} s")
        else:
            self._records.event(
                "drain_deadline",
                f"{name}: after {limit:g} s {seen.get('ongoing')} requests and {seen.get('connections')} connections "
                "are still open; they end with the cluster",
                level=EventLevel.WARNING,
            )

    async def release(self, version: VersionData, slot: Slot, reason: str) -> None:
        """The cluster terminates by itself once its lease is given back."""
        # While a step starts the cluster, a release could come before the cluster does.
        await workflow.wait_condition(lambda: version.step_of(slot) not in self._steps.running)
        if not slot.cluster_id:  # ``made`` does not tell: a start whose answer was lost may have begun all the same
            return
        await release_cluster(
            slot.cluster_id,
            Release(holder=self._arg.service_id, end=True, reason=f"{version.spec.name}: {reason}"),
        )
        slot.made = False
