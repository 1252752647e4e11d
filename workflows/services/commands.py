"""Commands of a service to the heads of its clusters."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandRequest
    from heliostat.models.agents import CommandKind
    from runtime.messages.services import ServiceInput
    from workflows.entity.commands import run_command
    from workflows.services.state import ServiceData, Slot


class HeadCommands:
    def __init__(self, arg: ServiceInput, s: ServiceData) -> None:
        self._arg = arg
        self._s = s

    def next_id(self, kind: CommandKind) -> str:
        self._s.commands += 1
        # With the revision of its life: a service that is started again counts from 1 again.
        return f"{self._arg.service_id}-{self._arg.revision}-{kind}-{self._s.commands}"

    async def run(
        self,
        slot: Slot,
        kind: CommandKind,
        args: dict[str, Any],
        timeout: timedelta,
        *,
        abandon: Callable[[], bool] = lambda: False,
        id: str = "",
    ) -> dict[str, Any]:
        """The head's answer. The command carries its number (``order``): an abandoned command may still arrive, and the
        head must not take it for newer than the command after it.

        Raises:
            ActivityError: the agent could not carry it out, or gave no answer within ``timeout``.
            CommandAbandoned: the head is lost, or ``abandon`` came true first.
        """
        assert slot.head_node_id is not None
        head, cluster = slot.head_node_id, slot.cluster_id
        id = id or self.next_id(kind)
        args = args | {"order": int(id.rpartition("-")[2])}
        return await run_command(
            CommandRequest(id=id, cluster_id=cluster, node_id=head, kind=kind, args=args),
            summary=f"{kind} on cluster {slot.number} ({cluster})",
            timeout=timeout,
            abandon=lambda: abandon() or slot.head_node_id != head or slot.cluster_id != cluster,
        )
