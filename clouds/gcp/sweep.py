"""What Compute Engine keeps beside machines: disks. They end with their machine; what is left was taken off one by
hand, or by a machine that was deleted without them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from clouds.base import OWNER_TAG, Gone
from clouds.gcp import errors
from clouds.gcp.history import reached
from clouds.gcp.instance import label
from clouds.gcp.session import Session, name_of
from heliostat.errors import CloudError


def clear(session: Session, installation_id: str, older_than_s: float, now: datetime) -> list[str]:
    """See ``Machines.leftovers``: one list, and a call for each. Of the parts of load balancers ``list_owned`` finds
    each by itself, and ``remove`` takes them all."""
    if label(installation_id) != installation_id:
        return []
    wanted = {"filter": f'labels.{OWNER_TAG} = "{installation_id}"'}
    pages = session.call("Disks", "aggregated_list", wanted, "list disks")
    disks: list[Any] = [disk for _, page in pages for disk in reached(page).disks]
    before = now - timedelta(seconds=older_than_s)
    gone: list[str] = []
    failed: CloudError | None = None
    for disk in disks:
        if list(disk.users) or datetime.fromisoformat(disk.creation_timestamp) >= before:
            continue
        where = {"zone": name_of(disk.zone), "disk": disk.name}
        try:
            session.call("Disks", "delete_unary", where, f"delete disk {disk.name}", disk.name)
            gone.append(disk.name)
        except (Gone, errors.InUse):
            pass  # gone, or a machine's by now
        except CloudError as e:
            failed = failed or e
    if failed is not None:
        raise failed
    return gone
