"""Ray Serve on the heads of a service's clusters: its config, its proxies' tokens, probes through the endpoint."""

from __future__ import annotations

from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from heliostat.models.agents import CommandKind, ServeStatus
    from heliostat.models.common import EventLevel
    from heliostat.models.services import ServiceVersionState
    from runtime.messages.services import ServiceInput
    from workflows import policies
    from workflows.entity.steps import RetryLater
    from workflows.services.commands import HeadCommands
    from workflows.services.records import ServiceRecords
    from workflows.services.state import LIVING, ServiceData, Slot, VersionData


class ServeOnHeads:
    def __init__(self, arg: ServiceInput, s: ServiceData, records: ServiceRecords, commands: HeadCommands) -> None:
        self._arg = arg
        self._s = s
        self._records = records
        self._commands = commands

    def observe(self, cluster_id: str, status: ServeStatus) -> None:
        """Serve's status on a head. A status of an earlier deploy is ignored."""
        found = self._s.slot_of(cluster_id)
        if found is None:
            return
        version, slot = found
        if not slot.deploy_id or status.deploy != slot.deploy_id:
            return
        if slot.healthy and not status.healthy:
            self._records.event(
                "serve_unhealthy",
                f"{version.spec.name} on cluster {slot.number}: {status.message or 'Serve reports it unhealthy'}",
                level=EventLevel.WARNING,
            )
        slot.healthy, slot.failed, slot.message = status.healthy, status.failed, status.message
        slot.http, slot.grpc = status.http or slot.http, status.grpc or slot.grpc
        self._records.touch(version)

    async def deploy(self, version: VersionData, slot: Slot) -> None:
        """Gives Serve on this head the version's config. What comes of it, ``observe`` hears."""
        wanted = slot.wanted(version.spec.id, version.capacity)
        if slot.given != wanted or not slot.deploy_id:
            slot.given, slot.deploy_id = wanted, self._commands.next_id(CommandKind.SERVE_DEPLOY)
            slot.taken = slot.healthy = slot.failed = False
            slot.message = ""
        args: dict[str, Any] = {
            "service_id": self._arg.service_id,
            "version_id": version.spec.id,
            "deploy": slot.deploy_id,
            "target_capacity": version.capacity,
            "gate": self._s.gate.model_dump(mode="json"),
        }
        gate = self._s.gate_key
        try:
            answer = await self._commands.run(
                slot,
                CommandKind.SERVE_DEPLOY,
                args,
                policies.DEPLOY_TIMEOUT,
                abandon=lambda: slot.given != wanted or version.state not in LIVING,
                id=slot.deploy_id,
            )
        except ActivityError as error:
            slot.failed = True
            why = getattr(error.cause, "message", None) or error.cause or error
            slot.message = f"the config was not deployed: {why}"
            self._records.touch(version)
            return
        slot.taken, slot.gate = True, gate
        slot.http, slot.grpc = str(answer.get("http") or ""), str(answer.get("grpc") or "")
        self._records.touch(version)

    async def set_gate(self, version: VersionData, slot: Slot) -> None:
        """New tokens for its proxies, or the end of a drain that was recalled."""
        gate = self._s.gate_key
        await self._commands.run(
            slot,
            CommandKind.SERVE_GATE,
            {"gate": self._s.gate.model_dump(mode="json"), "draining": False},
            policies.GATE_TIMEOUT,
            abandon=lambda: version.state == ServiceVersionState.TERMINATING,
        )
        slot.gate = gate
        self._records.touch(version)

    async def probe(self, version: VersionData, slot: Slot) -> None:
        """Real requests through the endpoint, on the path of the traffic, until their answers are as expected or one
        command's time is over. The version's own deadline ends the tries."""
        given = slot.given
        probes: list[dict[str, Any]] = [
            {"application": name, **probe.model_dump(mode="json")} for name, probe in version.spec.probes.items()
        ]
        if version.spec.grpc:
            probes.append({"application": "gRPC", "grpc": True, "timeout_s": policies.GRPC_PROBE_S})
        args: dict[str, Any] = {
            "url": self._s.url,
            "cluster_id": slot.cluster_id,
            "version_id": version.spec.id,
            "give_up_s": policies.PROBE_TIMEOUT.total_seconds(),
            "probes": probes,
        }
        answer = await self._commands.run(
            slot,
            CommandKind.SERVE_PROBE,
            args,
            policies.PROBE_TIMEOUT + policies.PROBE_ANSWER,
            abandon=lambda: slot.given != given or slot.failed or version.state not in LIVING,
        )
        if answer.get("healthy") and slot.given == given:
            self.mark_fit(version, slot)
        else:
            slot.message = str(answer.get("message") or "the answers to its probes were not as expected")
            self._records.touch(version)
            raise RetryLater

    def mark_fit(self, version: VersionData, slot: Slot) -> None:
        if not slot.probed:
            self._records.event("fit", f"{version.spec.name}: cluster {slot.number} answers real requests")
        slot.probed, slot.open_on, slot.message = slot.given, slot.head_node_id, ""
        self._records.touch(version)
