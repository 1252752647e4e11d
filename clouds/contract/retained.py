"""What a cluster retains from one head to the next: a disk and the private address. They are created for the first head
and end with the cluster, not with a machine (``Machines.attach_retained``, ``Machines.delete_orphans``)."""

from __future__ import annotations

from heliostat.models.common import Model
from heliostat.models.compute_configs import HeadNodeConfig

RETAINED_TAG = "heliostat-kept"
"""On the disk (``volume``) and on what holds the address (``address``), besides the owner's and the cluster's tags.
Such a resource belongs to no machine: the sweep deletes it when its cluster has ended."""

DEVICES = "@HELIOSTAT-KEPT-DEVICES@"
"""A placeholder in user-data for the paths at which the disk may appear; the cloud fills in all of them."""


class RetainedResources(Model):
    volume_gib: int = 0
    """0: no disk."""
    mount_path: str = ""
    address: bool = False
    had: bool = False
    """Whether a head has had them: then they are fixed to their zone and never created again. Until then they are
    created wherever a head can be launched, so that a zone without machines does not block the cluster."""

    @classmethod
    def of(cls, head: HeadNodeConfig, *, had: bool) -> RetainedResources | None:
        volume = head.retained_volume
        if volume is None and not head.fixed_address:
            return None
        gib, path = (volume.gib, volume.mount_path) if volume else (0, "")
        return cls(volume_gib=gib, mount_path=path, address=head.fixed_address, had=had)
