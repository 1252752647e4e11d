"""What a cluster's heads hand on from one to the next: a disk and the private address. It is made for the first head
and ends with the cluster, not with a machine (``Machines.attach_retained``, ``Machines.delete_orphans``)."""

from __future__ import annotations

from heliostat.models.common import Model
from heliostat.models.compute_configs import HeadNodeConfig

RETAINED_TAG = "heliostat-kept"
"""On the disk (``volume``) and on what holds the address (``address``), beside the owner's and the cluster's tags. What
has it is no machine's: the sweep deletes it when its cluster is over."""

DEVICES = "@HELIOSTAT-KEPT-DEVICES@"
"""Stands in user-data for the paths at which the disk may appear, with spaces between; the cloud writes them there."""


class RetainedResources(Model):
    volume_gib: int = 0
    """0: no disk."""
    mount_path: str = ""
    address: bool = False
    had: bool = False
    """A head has had it: it is where it is, and is never made anew. Until then it is made wherever a head can be
    launched, so that a zone without machines does not hold the cluster."""

    @classmethod
    def of(cls, head: HeadNodeConfig, *, had: bool) -> RetainedResources | None:
        volume = head.retained_volume
        if volume is None and not head.fixed_address:
            return None
        gib, path = (volume.gib, volume.mount_path) if volume else (0, "")
        return cls(volume_gib=gib, mount_path=path, address=head.fixed_address, had=had)
