"""What one sweep found and did."""

from __future__ import annotations

from heliostat.models.common import Model


class SweepResult(Model):
    machines: int = 0
    """Seen under our tag."""
    ended: list[str] = []
    """Machine ids that nobody owned."""
    leftovers: list[str] = []
    """Disks and the like that belonged to no machine; deleted."""
    endpoints: list[str] = []
    """Service ids of endpoints that nobody owned; removed."""
    orphaned: list[str] = []
    """Clusters, jobs and services whose workflow somebody ended by hand; their records and holders were told."""
