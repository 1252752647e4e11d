"""How long a cluster may live: maximum uptime, and idle shutdown behind a fence."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandRequest
    from heliostat.models.agents import CommandKind
    from heliostat.models.clusters import Activity, ClusterState
    from heliostat.models.common import EventLevel
    from runtime.messages.clusters import ClusterInput
    from workflows import policies
    from workflows.clusters.leases import Leases
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.state import ClusterData, NodeEntry
    from workflows.entity.alarm import Deadline, earliest
    from workflows.entity.commands import CommandAbandoned, run_command
    from workflows.entity.recorder import Recorder
    from workflows.entity.steps import Steps


class Idle:
    def __init__(
        self,
        request: ClusterInput,
        state: ClusterData,
        recorder: Recorder,
        progress: ClusterProgress,
        steps: Steps,
        leases: Leases,
    ) -> None:
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress
        self._steps = steps
        self._leases = leases

    def check_uptime(self, now: datetime) -> None:
        config = self._input.config
        up = self._s.uptime_deadline(config)
        if up is not None and now >= up:
            self._progress.terminate(f"maximum uptime of {config.maximum_uptime_minutes:g} minutes")

    def reconcile(self, now: datetime) -> Deadline | None:
        held = bool(self._s.leases) or self._s.activity != Activity.IDLE or self._s.phase != ClusterState.RUNNING
        if held:
            self._s.idle_since = None
        elif self._s.idle_since is None:
            self._s.idle_since = now
        config = self._input.config
        due = self._s.idle_deadline(config)
        head = self._s.head
        if due is not None and now >= due and head is not None:
            self._steps.start("idle shutdown", partial(self._shut_down, head))
        return earliest(now, [(due, "idle shutdown"), (self._s.uptime_deadline(config), "maximum uptime")])

    async def _shut_down(self, head: NodeEntry) -> None:
        """Fence first, then ask once more: work that came in between is work, and unknown counts as busy."""
        self._leases.fencing = True
        try:
            answer = await self._command(head, CommandKind.FENCE, {}, policies.FENCE_TIMEOUT)
            if self._s.terminate is not None or self._s.head is not head:
                return
            if answer is not None and answer.get("activity") == Activity.IDLE and not self._s.leases:
                minutes = self._input.config.idle_termination_minutes
                self._progress.terminate(f"idle for {minutes:g} minutes")
                return
            await self._command(head, CommandKind.UNFENCE, {}, policies.FENCE_TIMEOUT)
            self._s.idle_since = workflow.now()  # the next check follows after another idle period
        finally:
            self._leases.fencing = False
            self._recorder.dirty = True  # notifies those who took a lease in between: they wait for it

    async def _command(
        self, head: NodeEntry, kind: CommandKind, args: dict[str, Any], timeout: timedelta
    ) -> dict[str, Any] | None:
        """The head's answer; None if it gave none within ``timeout`` or could not carry it out."""
        self._s.commands += 1
        request = CommandRequest(
            id=f"{self._input.cluster_id}-{kind}-{self._s.commands}",
            cluster_id=self._input.cluster_id,
            node_id=head.id,
            kind=kind,
            args=args,
        )
        try:
            return await run_command(
                request, summary=f"{kind} on the head", timeout=timeout, abandon=lambda: not head.live
            )
        except CommandAbandoned:
            return None
        except ActivityError as error:
            self._recorder.event("command_failed", f"{kind}: {error.cause or error}", level=EventLevel.WARNING)
            return None
