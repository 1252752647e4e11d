"""What one sweep found and did."""

from __future__ import annotations

from heliostat.models.common import Event, EventLevel, Model, new_id, utcnow
from runtime.messages.common import SYSTEM

ENDED_BY_HAND = "its workflow was ended in Temporal by hand"


class SweepResult(Model):
    machines: int = 0
    """Seen under our tag."""
    ended: list[str] = []
    """Machine ids that nobody owned."""
    leftovers: list[str] = []
    """Orphaned resources: disks and the like that belonged to no machine; deleted."""
    endpoints: list[str] = []
    """Service ids of endpoints that nobody owned; removed."""
    orphaned: list[str] = []
    """Clusters, jobs and services whose workflow somebody ended by hand; their records and holders were settled."""


def orphaned_event(resource_id: str) -> Event:
    return Event(
        id=new_id("ev"),
        resource_id=resource_id,
        at=utcnow(),
        level=EventLevel.ERROR,
        kind="orphaned",
        actor=SYSTEM,
        message=ENDED_BY_HAND,
    )
