"""Orphaned disks and addresses of Compute Engine. Disks end with their machine. Those that are left were detached by
hand, or outlived a machine that was deleted without them, or they were retained (``clouds.contract.retained``) for a
cluster that has ended, as addresses are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

from clouds.contract.errors import Gone
from clouds.contract.machines import CLUSTER_TAG, OWNER_TAG
from clouds.contract.retained import RETAINED_TAG
from clouds.gcp.account import errors
from clouds.gcp.account.operations import label, reached
from clouds.gcp.account.session import Session, name_of
from clouds.gcp.machines.retained import RetainedStore
from clouds.try_each import try_each


def clear(
    session: Session, retained: RetainedStore, installation_id: str, before: datetime, lives: Callable[[str], bool]
) -> list[str]:
    """See ``Machines.delete_orphans``: two lists, and a call for each. ``list_owned`` finds a load balancer's parts
    by itself, and ``remove`` deletes them all."""
    if label(installation_id) != installation_id:
        return []
    lives = functools.cache(lives)
    old = [*_disks(session, installation_id, before), *_addresses(retained, installation_id, before)]
    orphans = [one for one in old if one.cluster_id is None or not lives(one.cluster_id)]
    gone_or_used = (Gone, errors.InUse)  # by a machine, since the list was read
    return [one.name for one in try_each(orphans, lambda one: one.delete(), lambda e: isinstance(e, gone_or_used))]


class Old(NamedTuple):
    cluster_id: str | None
    """The cluster that retains it for its heads, if one does."""
    name: str
    delete: Callable[[], Any]


def _disks(session: Session, installation_id: str, before: datetime) -> Iterator[Old]:
    wanted = {"filter": f'labels.{OWNER_TAG} = "{installation_id}"'}
    pages = session.call("Disks", "aggregated_list", wanted, "list disks")
    for disk in [disk for _, page in pages for disk in reached(page).disks]:
        if list(disk.users) or datetime.fromisoformat(disk.creation_timestamp) >= before:
            continue
        where = {"zone": name_of(disk.zone), "disk": disk.name}
        cluster_id = disk.labels.get(CLUSTER_TAG, "") if RETAINED_TAG in disk.labels else None
        doing = f"delete disk {disk.name}"
        delete = functools.partial(session.call, "Disks", "delete_unary", where, doing, disk.name)
        yield Old(cluster_id, disk.name, delete)


def _addresses(retained: RetainedStore, installation_id: str, before: datetime) -> Iterator[Old]:
    for name, cluster_id in retained.addresses_left(installation_id, before):
        yield Old(cluster_id, name, functools.partial(retained.delete_address, name))
