"""What Compute Engine keeps beside machines: disks. They end with their machine; what is left was taken off one by
hand, or by a machine that was deleted without them; or a head keeps it (``clouds.contract.retained``), as it
may an address, and
its cluster is over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from clouds.contract.errors import Gone
from clouds.contract.machines import CLUSTER_TAG, OWNER_TAG
from clouds.contract.retained import RETAINED_TAG
from clouds.gcp.account import errors
from clouds.gcp.account.operations import label, reached
from clouds.gcp.account.session import Session, name_of
from clouds.gcp.machines.retained import RetainedStore
from heliostat.errors import CloudError


def clear(
    session: Session, retained: RetainedStore, installation_id: str, before: datetime, lives: Callable[[str], bool]
) -> list[str]:
    """See ``Machines.delete_orphans``: two lists, and a call for each. ``list_owned`` finds a load balancer's parts
    by itself, and ``remove`` deletes them all."""
    if label(installation_id) != installation_id:
        return []
    lives = functools.cache(lives)
    gone: list[str] = []
    failed: CloudError | None = None
    for cluster_id, name, delete in [*_disks(session, installation_id, before),
                                     *_addresses(retained, installation_id, before)]:  # fmt: skip
        if cluster_id is not None and lives(cluster_id):
            continue
        try:
            delete()
            gone.append(name)
        except (Gone, errors.InUse):
            pass  # gone, or a machine's by now
        except CloudError as e:
            failed = failed or e
    if failed is not None:
        raise failed
    return gone


Old = tuple[str | None, str, Callable[[], Any]]
"""The cluster whose head keeps it, if one does; its name; what deletes it."""


def _disks(session: Session, installation_id: str, before: datetime) -> Iterator[Old]:
    wanted = {"filter": f'labels.{OWNER_TAG} = "{installation_id}"'}
    pages = session.call("Disks", "aggregated_list", wanted, "list disks")
    for disk in [disk for _, page in pages for disk in reached(page).disks]:
        if list(disk.users) or datetime.fromisoformat(disk.creation_timestamp) >= before:
            continue
        where = {"zone": name_of(disk.zone), "disk": disk.name}
        cluster_id = disk.labels.get(CLUSTER_TAG, "") if RETAINED_TAG in disk.labels else None
        doing = f"delete disk {disk.name}"
        yield cluster_id, disk.name, functools.partial(session.call, "Disks", "delete_unary", where, doing, disk.name)


def _addresses(retained: RetainedStore, installation_id: str, before: datetime) -> Iterator[Old]:
    for name, cluster_id in retained.addresses_left(installation_id, before):
        yield cluster_id, name, functools.partial(retained.delete_address, name)
