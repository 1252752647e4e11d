"""Orphaned disks and network interfaces of EC2. Both end with their machine. Those that are left were detached by hand
or by a failure of EC2, or they were retained (``clouds.contract.retained``) for a cluster that has ended."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from clouds.aws.account.session import AwsSession
from clouds.contract.machines import CLUSTER_TAG, OWNER_TAG
from clouds.contract.retained import RETAINED_TAG
from clouds.try_each import try_each
from heliostat.errors import CloudError

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import FilterTypeDef, TagTypeDef


class Old(NamedTuple):
    tags: dict[str, str]
    id: str
    operation: str
    """What deletes it."""
    argument: str
    """Of that operation, for the id."""


class Orphans:
    """Args:
    session: of the account and region.
    clock: in seconds, since an interface does not say when it was made: it is old when it was first seen that long ago
        by this process.
    """

    def __init__(self, session: AwsSession, clock: Callable[[], float] = time.monotonic) -> None:
        self._session, self._clock = session, clock
        self._first_seen: dict[str, float] = {}

    def clear(self, installation_id: str, older_than_s: float, lives: Callable[[str], bool]) -> list[str]:
        """See ``Machines.delete_orphans``. Two lists, and a call for each."""
        lives = functools.cache(lives)
        old = [*self._volumes(installation_id, older_than_s), *self._interfaces(installation_id, older_than_s)]
        orphans = [o for o in old if RETAINED_TAG not in o.tags or not lives(o.tags.get(CLUSTER_TAG, ""))]

        def delete(one: Old) -> None:
            self._session.call("ec2", one.operation, one.id, **{one.argument: one.id})

        def passes(error: CloudError) -> bool:  # gone, or a machine's by now
            code = str(error.details.get("code"))
            return code.endswith("NotFound") or "InUse" in code

        return [one.id for one in try_each(orphans, delete, passes)]

    def _volumes(self, installation_id: str, older_than_s: float) -> Iterator[Old]:
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        held = self._session.pages("ec2", "DescribeVolumes", "Volumes", Filters=_unattached(installation_id))
        for volume in held:
            if volume["CreateTime"] < before:
                yield Old(_tags(volume.get("Tags", [])), volume["VolumeId"], "DeleteVolume", "VolumeId")

    def _interfaces(self, installation_id: str, older_than_s: float) -> Iterator[Old]:
        filters = _unattached(installation_id)
        pages = self._session.pages("ec2", "DescribeNetworkInterfaces", "NetworkInterfaces", Filters=filters)
        held, now = {str(i["NetworkInterfaceId"]): _tags(i.get("TagSet", [])) for i in pages}, self._clock()
        self._first_seen = {i: self._first_seen.get(i, now) for i in held}
        for interface, tags in held.items():
            if now - self._first_seen[interface] >= older_than_s:
                yield Old(tags, interface, "DeleteNetworkInterface", "NetworkInterfaceId")


def _unattached(installation_id: str) -> list[FilterTypeDef]:
    return [{"Name": f"tag:{OWNER_TAG}", "Values": [installation_id]}, {"Name": "status", "Values": ["available"]}]


def _tags(listed: list[TagTypeDef]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in listed}
