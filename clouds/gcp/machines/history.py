"""What has become of machines that are no longer there, by Compute Engine's operations.

A deleted instance is forgotten at once, but the operations that made and ended it are kept for 14 days and more
(https://cloud.google.com/compute/docs/reference/rest/v1/globalOperations). So a token whose machine has ended is known,
and does not boot again when its launch is repeated after the hour or so for which ``requestId`` is remembered."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from clouds.contract.machines import Machine, MachineState
from clouds.gcp.account import errors
from clouds.gcp.account.operations import done, reached
from clouds.gcp.account.session import Session, matching, name_of
from clouds.gcp.machines.combined import Combined
from heliostat.errors import CloudError

NAMES_A_QUESTION = 40
"""Names of 35 letters in the filter of one list: its URL stays below 2 KiB."""
LAG_S = 60
"""An instance whose insert is done may be missing in a list for a moment."""

ENDINGS = {
    "delete": "terminated",
    "stop": "somebody stopped it",
    "suspend": "somebody suspended it",
    "compute.instances.preempted": "the cloud reclaimed the machine",
    "compute.instances.guestTerminate": "the machine stopped itself",
    "compute.instances.hostError": "the host failed",
    "compute.instances.terminateOnHostMaintenance": "the host was taken out of service",
    "compute.instances.systemTerminate": "the cloud ended it after its maximum run time",
}
"""By ``operationType`` (https://cloud.google.com/compute/docs/instances/spot and
.../host-maintenance-event-examples)."""


@dataclass
class MachineHistory:
    """The operations on one machine, oldest first."""

    inserts: list[Any] = field(default_factory=list)
    endings: list[Any] = field(default_factory=list)

    @property
    def failed(self) -> set[str]:
        """Request ids of the attempts to launch it that came to nothing."""
        return {op.client_operation_id for op in self.inserts if done(op) and failure(op) is not None}

    @property
    def insert(self) -> Any | None:
        """The attempt that made it, or is about to."""
        return next((op for op in reversed(self.inserts) if not done(op) or failure(op) is None), None)

    @property
    def reason(self) -> str:
        return ENDINGS[self.endings[0].operation_type] if self.endings else ""

    def machine(self, name: str, now: datetime) -> Machine | None:
        """What to say of it while no list has it; None if it never was."""
        insert = self.insert
        if insert is None:
            return None
        launched = datetime.fromisoformat(insert.insert_time)
        state = MachineState.PENDING
        if self.endings:
            state = MachineState.GONE if any(done(op) for op in self.endings) else MachineState.STOPPING
        elif done(insert) and (now - launched).total_seconds() > LAG_S:
            state = MachineState.GONE
        return Machine(
            machine_id=name,
            node_id=None,
            cluster_id=None,
            state=state,
            launched_at=launched,
            reason=self.reason or ("it no longer exists" if state is MachineState.GONE else ""),
        )


class History:
    """Histories of one project's machines. Questions of several threads go together."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.of = Combined(self._histories, NAMES_A_QUESTION).get
        """Histories by machine name; none for a name that no operation has."""

    def _histories(self, names: list[str]) -> dict[str, MachineHistory]:
        links = [f".*/instances/{name}" for name in names]
        pages = self._session.call(
            "GlobalOperations",
            "aggregated_list",
            {"filter": matching("targetLink", links)},
            "list operations on machines",
        )
        found: dict[str, MachineHistory] = {}
        for op in sorted((op for _, page in pages for op in reached(page).operations), key=_when):
            history = found.setdefault(name_of(op.target_link), MachineHistory())
            if op.operation_type == "insert":
                history.inserts.append(op)
            elif op.operation_type in ENDINGS and failure(op) is None:
                history.endings.append(op)
        return found


def failure(op: Any) -> CloudError | None:
    return errors.operation_error(op, "launch a machine", name_of(op.target_link))


def _when(op: Any) -> datetime:
    return datetime.fromisoformat(op.insert_time).astimezone(UTC)
