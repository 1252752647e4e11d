"""A cluster's retained resources on Google Cloud: a persistent disk, which is of one zone, and a reserved internal
address, which is of the region.

The first head's own insert makes the disk, so a zone without machines makes none; should a failed insert leave one
behind, it is deleted when a head has its own elsewhere. The disk's name is the same in each zone. Addresses cannot be
made with labels: theirs are in the description, as those of load balancers' parts are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from clouds.contract.errors import Gone, NotOffered
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, MachineSpec
from clouds.contract.retained import RETAINED_TAG, RetainedResources
from clouds.gcp.account.operations import label, reached
from clouds.gcp.account.resources import ADDRESS, Resources
from clouds.gcp.account.session import Session, name_of
from clouds.gcp.machines.advanced import RETAINED_DEVICE
from clouds.gcp.machines.catalogue import MachineType
from clouds.gcp.machines.instance import subnetwork
from clouds.try_each import try_each
from heliostat.errors import CloudError
from heliostat.models.clouds import GcpConfig

_NAMES = "hs-kept-[0-9a-f]{32}"


def name_for(cluster_id: str) -> str:
    """Of the cluster's disk and of its address."""
    return f"hs-kept-{hashlib.sha256(cluster_id.encode()).hexdigest()[:32]}"


@dataclass(frozen=True)
class RetainedState:
    """The retained resources that exist before a head's insert."""

    keep: RetainedResources
    ip: str | None = None
    zones: frozenset[str] = field(default_factory=frozenset)
    """Of the disk."""

    def may_be_in(self, zone: str) -> bool:
        return zone in self.zones or not (self.keep.had and self.keep.volume_gib)


class RetainedStore:
    """Args:
    installation_id: whose things are found and deleted here.
    tags: labels of what is made, besides ours.
    poll_s: between two looks at an operation.
    """

    def __init__(
        self, config: GcpConfig, session: Session, installation_id: str, tags: Mapping[str, str], poll_s: float
    ) -> None:
        self._config, self._session, self._tags = config, session, tags
        self._installation_id = installation_id
        self._resources = Resources(session, config.region, poll_s)

    def prepare(self, spec: MachineSpec, keep: RetainedResources) -> RetainedState:
        """Reserves the address, and looks for the disk. Raises CloudError for what is not there any more, NotOffered
        for a zone in which it is not."""
        name, ip = name_for(spec.cluster_id), None
        zones = frozenset(name_of(d.zone) for d in self._disks(name)) if keep.volume_gib else frozenset()
        if keep.had and keep.volume_gib:
            if not zones:
                raise self._missing("disk", spec)
            if spec.zone is not None and spec.zone not in zones:
                raise NotOffered(
                    f"The head cannot be in zone {spec.zone}: its retained disk is in {', '.join(sorted(zones))}.",
                    remedy="Use that zone.",
                    resource=spec.node_id,
                )
        if keep.address:
            found = self._resources.get(ADDRESS, name)
            if found is None and keep.had:
                raise self._missing("address", spec)
            if found is None:
                self._resources.make(ADDRESS, name, self._address(spec))
                found = self._resources.get(ADDRESS, name)
            if found is None or not found.address:
                raise CloudError(f"Google Cloud does not show address {name} yet.", remedy="Try again.")
            ip = str(found.address)
        return RetainedState(keep, ip, zones)

    def for_insert(self, spec: MachineSpec, retained: RetainedState, kind: MachineType, zone: str) -> dict[str, Any]:
        """Arguments of ``instance.request``."""
        disk = self._disk(spec, retained, kind, zone) if retained.keep.volume_gib else None
        return {"retained_disk": disk, "ip": retained.ip}

    def attach(self, cluster_id: str, machine_id: str) -> None:
        """See ``Machines.attach_retained``: the machine has it since its insert; one list, which finds the others."""
        disks = self._disks(name_for(cluster_id))
        if any(name_of(user) == machine_id for d in disks for user in d.users):
            self._delete_disks([d for d in disks if not list(d.users)])

    def release(self, cluster_id: str) -> None:
        """One list, and a call for each."""
        name = name_for(cluster_id)
        self._delete_disks(self._disks(name))
        self._resources.delete(ADDRESS, name)

    def addresses_left(self, installation_id: str, before: datetime) -> Iterator[tuple[str, str]]:
        """(name, cluster) of those of that installation that no machine has, made before that time. One list."""
        for address in self._resources.list(ADDRESS, _NAMES):
            owner = json.loads(address.description or "{}")
            old = datetime.fromisoformat(address.creation_timestamp) < before
            if owner.get(OWNER_TAG) == installation_id and not list(address.users) and old:
                yield address.name, str(owner.get(CLUSTER_TAG, ""))

    def delete_address(self, name: str) -> None:
        self._resources.delete(ADDRESS, name)

    # -- inside

    def _disk(self, spec: MachineSpec, retained: RetainedState, kind: MachineType, zone: str) -> dict[str, Any]:
        name = name_for(spec.cluster_id)
        ours: dict[str, Any] = {"boot": False, "auto_delete": False, "device_name": RETAINED_DEVICE}
        if zone in retained.zones:
            return ours | {"source": f"projects/{self._session.project}/zones/{zone}/disks/{name}"}
        ours["initialize_params"] = {
            "disk_name": name,
            "disk_size_gb": retained.keep.volume_gib,
            "disk_type": f"zones/{zone}/diskTypes/{self._config.root_volume_type or kind.disk}",
            "labels": self._labels(spec),
        }
        if self._config.kms_key is not None:
            ours["disk_encryption_key"] = {"kms_key_name": self._config.kms_key}
        return ours

    def _disks(self, name: str) -> list[Any]:
        """In all zones of the project; ours alone."""
        wanted = {"filter": f'name = "{name}"'}
        pages = self._session.call("Disks", "aggregated_list", wanted, "list disks")
        every = [disk for _, page in pages for disk in reached(page).disks]
        return [d for d in every if d.labels.get(OWNER_TAG) == self._installation_id and RETAINED_TAG in d.labels]

    def _delete_disks(self, disks: list[Any]) -> None:
        """Raises, after all were tried, what the first that failed did: InUse among it, which passes."""

        def delete(disk: Any) -> None:
            where, doing = {"zone": name_of(disk.zone), "disk": disk.name}, f"delete disk {disk.name}"
            self._resources.wait(self._session.call("Disks", "delete_unary", where, doing, disk.name))

        try_each(disks, delete, lambda error: isinstance(error, Gone))

    def _address(self, spec: MachineSpec) -> dict[str, Any]:
        owner = {OWNER_TAG: spec.installation_id, CLUSTER_TAG: spec.cluster_id}
        return {
            "address_type": "INTERNAL",
            "purpose": "GCE_ENDPOINT",
            "subnetwork": subnetwork(self._config),
            "description": json.dumps(owner, sort_keys=True),
        }

    def _labels(self, spec: MachineSpec) -> dict[str, str]:
        given = {**self._tags, **spec.tags}
        theirs = {label(key): label(value) for key, value in given.items() if label(key)[:1].isalpha()}
        theirs.pop(NODE_TAG, None)  # the first head's
        ours = {OWNER_TAG: label(spec.installation_id), CLUSTER_TAG: label(spec.cluster_id), RETAINED_TAG: "volume"}
        return theirs | ours

    def _missing(self, what: str, spec: MachineSpec) -> CloudError:
        return CloudError(
            f"Google Cloud does not show the {what} that the heads of cluster {spec.cluster_id} retain.",
            remedy="If it was deleted by hand, create another cluster.",
            resource=spec.node_id,
        )
